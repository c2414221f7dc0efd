"""Answers of onnxruntime-genai about images, a JSON line a question: genai_answers.py FOLDER QUESTIONS.json"""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

folder, questions = sys.argv[1:]
model = og.Model(folder)
processor = model.create_multimodal_processor()
tokenizer = og.Tokenizer(model)
for asked in json.loads(Path(questions).read_text()):
    content = f"<image>{asked['question']}" if asked.get("image") else asked["question"]
    turns = json.dumps([{"role": "user", "content": content}])
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(prompt, images=og.Images.open(asked["image"]) if asked.get("image") else None)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=1024, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.set_inputs(inputs)
    ids = []
    while not generator.is_done() and len(ids) < 24:
        generator.generate_next_token()
        ids.append(int(generator.get_next_tokens()[0]))
    print(json.dumps({"text": processor.decode(ids)}), flush=True)
