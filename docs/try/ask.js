// Asks the demo model in the reader's browser. scripts/docs_hook.py makes the folder assets/ beside this file.
const here = new URL("assets/", import.meta.url);
const part = (name) => document.getElementById(`ask-${name}`);
const say = (text) => { part("state").textContent = text; };
let chosen = null; // URL of the picture
let loaded = null; // promise of what `load` returns

async function load() {
    say("Loading ONNX Runtime …");
    const { AutoModelForImageTextToText, AutoProcessor, TextStreamer, env, load_image } =
        await import(new URL("transformers.min.js", here));
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
    env.localModelPath = here.pathname;
    env.backends.onnx.wasm.wasmPaths = here.href;
    env.backends.onnx.wasm.numThreads = 1; // more need headers that a static site has not
    const sizes = new Map();
    const progress = ({ status, file, loaded, total }) => {
        if (status !== "progress" || !total) return;
        sizes.set(file, [loaded, total]);
        const [done, all] = [...sizes.values()].reduce(([a, b], [x, y]) => [a + x, b + y], [0, 0]);
        say(`Loading the model: ${(done / 1e6).toFixed(1)} of ${(all / 1e6).toFixed(1)} MB`);
    };
    const processor = await AutoProcessor.from_pretrained("model", { progress_callback: progress });
    const model = await AutoModelForImageTextToText.from_pretrained("model", { device: "wasm", progress_callback: progress });
    return { model, processor, load_image, TextStreamer };
}

async function ask(event) {
    event.preventDefault();
    const question = part("question").value.trim();
    if (!chosen || !question) {
        say(chosen ? "Write a question." : "Choose a picture.");
        return;
    }
    part("button").disabled = true;
    part("answer").textContent = "";
    try {
        const { model, processor, load_image, TextStreamer } = await (loaded ??= load());
        say("Looking …");
        const content = [{ type: "image" }, { type: "text", text: question }];
        const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
        const started = performance.now();
        const inputs = await processor(await load_image(chosen), text, { add_special_tokens: false });
        let first = 0;
        const streamer = new TextStreamer(processor.tokenizer, {
            skip_prompt: true,
            skip_special_tokens: true,
            callback_function: (piece) => {
                first ||= performance.now();
                part("answer").textContent += piece;
            },
        });
        const ids = await model.generate({
            ...inputs, max_new_tokens: 64, do_sample: false, repetition_penalty: 1.0, streamer,
        });
        const prompt = inputs.input_ids.dims.at(-1), total = performance.now() - started;
        say(`${prompt} tokens of prompt, ${ids.dims.at(-1) - prompt} new; first words after ` +
            `${((first || performance.now()) - started).toFixed(0)} ms, all after ${total.toFixed(0)} ms`);
    } catch (e) {
        loaded = null;
        say(`It did not work: ${e.message ?? e}. Load the page again, or try another browser.`);
    } finally {
        part("button").disabled = false;
    }
}

function choose(url, button) {
    chosen = url;
    part("images").querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
}

function addPicture(url, name) {
    const button = document.createElement("button");
    button.type = "button";
    const image = new Image();
    image.src = url;
    image.alt = name;
    button.append(image);
    button.addEventListener("click", () => choose(url, button));
    part("images").append(button);
    return button;
}

const found = await fetch(new URL("pictures.json", here)).then((r) => (r.ok ? r.json() : null), () => null);
if (found) {
    document.getElementById("ask-missing").hidden = true;
    document.getElementById("ask").hidden = false;
    const buttons = found.map((name) => addPicture(new URL(name, here).href, name));
    choose(new URL(found[0], here).href, buttons[0]);
    part("form").addEventListener("submit", ask);
    part("file").addEventListener("change", ({ target }) => {
        if (!target.files.length) return;
        const url = URL.createObjectURL(target.files[0]);
        choose(url, addPicture(url, target.files[0].name));
    });
}
