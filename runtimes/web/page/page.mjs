// The page: pick a bundle and a backend, type a prompt, watch the text, its speed and the memory.

const $ = (id) => document.getElementById(id);
const CHART = [40, 240]; // tokens that the chart has room for, at least and at most

let worker;
let bundles = []; // rows of {name, and url or files}; provider: the backend to begin with, if that is known already
let chosen; // one of them
let opened = false; // the worker has it
let times = [];

/** Begin anew with the chosen bundle: another worker, so that all memory of the one before is given back. */
function open(provider) {
  worker?.terminate();
  worker = new Worker("/page/engine.mjs", { type: "module" });
  worker.onmessage = ({ data: { event, ...parts } }) => handlers[event](parts);
  worker.onerror = (event) => handlers.failed({ message: event.message || "the page's worker could not be started" });
  for (const id of ["speed", "prompt-speed", "memory", "opened"]) $(id).textContent = "–";
  for (const id of ["model", "facts", "prompt-shown", "made", "chart", "chart-top"]) $(id).replaceChildren();
  for (const id of ["error", "note"]) $(id).hidden = true;
  opened = false;
  running(false);
  document.body.dataset.state = "opening";
  say("Loading the bundle");
  const { url, files } = chosen;
  worker.postMessage({ op: "open", url, files, provider, threads: Number($("threads").value) });
}

const handlers = {
  progress: ({ done, total }) => {
    $("progress").hidden = done >= total;
    $("progress").value = done / total;
    say(done < total ? `Loading ${bytes(done)} of ${bytes(total)}` : "Opening the graph");
  },
  backend: ({ provider }) => choose(provider),
  opened: ({ name, manifest, loadMs, memory, readsText, threads }) => {
    opened = true;
    $("prompt").placeholder = readsText ? "" : "Token ids: numbers between spaces";
    if (!readsText && /[^0-9\s,]/.test($("prompt").value)) $("prompt").value = "";
    $("opened").textContent = duration(loadMs);
    takes(memory);
    describe(name, manifest, threads);
    note(manifest);
    running(false);
    document.body.dataset.state = "ready";
    say(`Ready on ${label()}`);
  },
  pieces: ({ text, ms, stats, memory }) => {
    const box = $("text");
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    $("made").append(text);
    if (follows) box.scrollTop = box.scrollHeight;
    figures(stats, memory);
    chart(ms);
  },
  done: ({ ids, stats, memory }) => {
    running(false);
    figures(stats, memory);
    document.body.dataset.ids = ids.join(" ");
    document.body.dataset.state = "done";
    say(`${stats.newTokens} tokens in ${duration(stats.decodeMs)} on ${label()}`);
  },
  failed: ({ message }) => {
    running(false);
    document.body.dataset.state = "failed";
    $("error").textContent = message;
    $("error").hidden = false;
    $("progress").hidden = true;
    say("");
  },
};

function generate(event) {
  event.preventDefault();
  if ($("go").disabled) return;
  times = [];
  $("error").hidden = true;
  $("prompt-shown").textContent = $("prompt").value;
  $("made").textContent = "";
  running(true);
  say("Generating");
  const seed = $("seed").value === "" ? undefined : Number($("seed").value);
  const options = {
    maxTokens: Number($("max").value),
    temperature: Number($("temperature").value),
    topP: Number($("top-p").value),
    seed,
  };
  worker.postMessage({ op: "generate", prompt: $("prompt").value, options });
}

function running(yes) {
  document.body.classList.toggle("running", yes);
  if (yes) document.body.dataset.state = "running";
  $("go").disabled = yes || !opened;
  $("stop").disabled = !yes;
}

function figures({ promptTokens, promptMs, newTokens, decodeMs }, memory) {
  $("speed").textContent = rate(newTokens, decodeMs);
  $("prompt-speed").textContent = rate(promptTokens, promptMs);
  takes(memory);
}

function takes({ heap, device }) {
  $("memory").textContent = bytes(heap);
  $("device").textContent = bytes(device);
  $("device").parentElement.hidden = device === 0;
}

function chart(ms) {
  times = times.concat(ms).slice(-CHART[1]);
  if (times.length === 0) return;
  const top = Math.max(...times, 0.001);
  const room = Math.max(times.length, CHART[0]);
  const x = (i) => ((i + room - times.length) * 240) / (room - 1);
  const points = times.map((t, i) => `${x(i).toFixed(1)},${(62 - (60 * t) / top).toFixed(1)}`).join(" ");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points);
  $("chart").replaceChildren(line);
  $("chart-top").textContent = `peak ${top.toFixed(1)}`;
}

function describe(name, { model, target, precision, files, state, graphs, tokenizer }, threads) {
  $("model").textContent = `${name} · ${model.title}`;
  const weights = files.filter((f) => /\.onnx(\.data)?$/.test(f.path)).reduce((sum, f) => sum + f.bytes, 0);
  const item = { float32: 4, float16: 2, int64: 8, int32: 4 };
  const size = ({ shape, dtype }) => shape.reduce((n, d) => n * (d === "B" ? 1 : d), item[dtype] ?? 4);
  const rows = {
    Target: target,
    Precision: precision,
    Parameters: model.parameters.toLocaleString("en"),
    Weights: bytes(weights),
    State: bytes(state.reduce((sum, s) => sum + size(s), 0)),
    Tokenizer: tokenizer?.kind ?? "none",
    ...(model.max_tokens ? { Longest: `${model.max_tokens} tokens` } : {}),
    ...(graphs && Object.keys(graphs).length ? { Lengths: Object.keys(graphs).join(", ") } : {}),
    Threads: globalThis.crossOriginIsolated ? `${threads} of ${navigator.hardwareConcurrency}` : "1 (the page is not isolated)",
  };
  const cells = Object.entries(rows).flatMap(([key, value]) =>
    [["dt", key], ["dd", value]].map(([tag, text]) => Object.assign(document.createElement(tag), { textContent: text })),
  );
  $("facts").replaceChildren(...cells);
}

/** What the person should know of this bundle on this page. */
function note({ target, runtime, provider: made, model }) {
  const notes = [];
  if (model.form === "whole" || (model.input && model.input.kind !== "tokens")) {
    opened = false; // nothing that could be typed here
    const reads = model.form === "whole" ? "whole sequences at once" : "features, not text";
    notes.push(`This model reads ${reads}: it is open, but there is no text for it to go on with.`);
  }
  if (runtime !== "onnxruntime-web" && !/webgpu/i.test(made)) {
    notes.push(`This bundle was exported for ${target}, not for browsers, so it may be slow or large here; web-int8 and web-fp32 are the targets for them.`);
  }
  $("note").textContent = notes.join(" ");
  $("note").hidden = notes.length === 0;
}

const say = (text) => ($("status").textContent = text);
const provider = () => document.querySelector("[name=provider]:checked").value;
const label = () => ({ wasm: "WebAssembly", webgpu: "WebGPU" })[provider()];
const rate = (count, ms) => (ms > 0 ? ((1000 * count) / ms).toLocaleString("en", { maximumFractionDigits: 0 }) : "–");
const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const bytes = (n) => (n < 1e6 ? `${(n / 1e3).toFixed(0)} kB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(2)} GB`);

function choose(value) {
  document.querySelector(`[name=provider][value=${value}]`).checked = true;
}

/** Open a row of the list of bundles. */
function pick(row) {
  chosen = row;
  if (row.provider) choose(row.provider);
  open(row.provider);
}

/** The list of bundles anew, with that row shown. */
function list(shown) {
  $("bundle").replaceChildren(...bundles.map((row, i) => new Option(row.name, i, false, row === shown)));
}

/** A folder that a person picked takes the place of the one picked before. */
function pickFolder(files) {
  const rows = files.map((file) => [file.webkitRelativePath || file.name, file]); // a worker is not told the paths
  const row = { name: rows[0][0].split("/")[0], files: rows };
  bundles = [...bundles.filter((other) => !other.files), row];
  list(row);
  pick(row);
}

async function start() {
  bundles = await (await fetch("/bundles.json")).json();
  list(bundles[0]);
  pick(bundles[0]);
}

for (let count = 1; count <= Math.min(navigator.hardwareConcurrency, 16); count *= 2) $("threads").add(new Option(count));
$("form").onsubmit = generate;
$("stop").onclick = () => worker.postMessage({ op: "stop" });
$("bundle").onchange = () => pick(bundles[$("bundle").value]);
for (const id of ["backend", "threads"]) $(id).onchange = () => chosen && open(provider());
$("open-folder").onclick = () => $("folder").click();
$("folder").onchange = ({ target }) => {
  const files = Array.from(target.files);
  target.value = ""; // so that the same folder can be picked again
  if (files.length > 0) pickFolder(files);
  else handlers.failed({ message: "this folder is empty" });
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate(event);
};
choose("wasm");
start().catch((error) => handlers.failed({ message: String(error) }));
