// Answers of transformers.js about images, one JSON line a question: answers.mjs FOLDER DTYPES QUESTIONS.json
import { readFileSync } from "node:fs";
import path from "node:path";
import { AutoModelForImageTextToText, AutoProcessor, env, load_image } from "@huggingface/transformers";

const [folder, dtype, questions] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + "/";
const name = path.basename(folder);
const processor = await AutoProcessor.from_pretrained(name);
const options = dtype === "config" ? {} : { dtype: JSON.parse(dtype) };
const model = await AutoModelForImageTextToText.from_pretrained(name, { device: "cpu", ...options });
for (const { image, question } of JSON.parse(readFileSync(questions))) {
    const content = [{ type: "image" }, { type: "text", text: question }];
    const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    const inputs = await processor(await load_image(image), text, { add_special_tokens: false });
    const ids = await model.generate({ ...inputs, max_new_tokens: 24, do_sample: false, repetition_penalty: 1.0 });
    const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
    console.log(JSON.stringify(processor.batch_decode(answer, { skip_special_tokens: true })[0]));
}
