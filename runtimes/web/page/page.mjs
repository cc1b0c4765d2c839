// The page: pick a bundle and a backend, type a prompt, watch the text, its speed and the memory.

const $ = (id) => document.getElementById(id);
const CHART = 240; // tokens that the chart shows

let worker;
let chosen; // {url} or {files}
let times = [];

/** Begin anew with a bundle: another worker, so that all memory of the one before is given back. */
function open(source) {
  chosen = source;
  worker?.terminate();
  worker = new Worker("/page/engine.mjs", { type: "module" });
  worker.onmessage = ({ data: { event, ...parts } }) => handlers[event](parts);
  worker.onerror = (event) => handlers.failed({ message: event.message || "the page's worker could not be started" });
  for (const id of ["speed", "prompt-speed", "memory", "opened"]) $(id).textContent = "–";
  $("error").hidden = true;
  running(false);
  $("go").disabled = true;
  say("Loading the bundle");
  worker.postMessage({ op: "open", ...source, provider: provider() });
}

const handlers = {
  progress: ({ done, total }) => {
    $("progress").hidden = done >= total;
    $("progress").value = done / total;
    say(done < total ? `Loading ${bytes(done)} of ${bytes(total)}` : "Opening the graph");
  },
  opened: ({ name, manifest, loadMs, memory, readsText }) => {
    $("prompt").placeholder = readsText ? "" : "Token ids: numbers between spaces";
    if (!readsText && /[^0-9\s,]/.test($("prompt").value)) $("prompt").value = "";
    $("go").disabled = false;
    $("opened").textContent = duration(loadMs);
    $("memory").textContent = bytes(memory);
    describe(name, manifest);
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
  $("go").disabled = yes;
  $("stop").disabled = !yes;
}

function figures({ promptTokens, promptMs, newTokens, decodeMs }, memory) {
  $("speed").textContent = rate(newTokens, decodeMs);
  $("prompt-speed").textContent = rate(promptTokens, promptMs);
  $("memory").textContent = bytes(memory);
}

function chart(ms) {
  times = times.concat(ms).slice(-CHART);
  if (times.length === 0) return;
  const top = Math.max(...times, 0.001);
  const x = (i) => ((i + CHART - times.length) * 240) / (CHART - 1);
  const points = times.map((t, i) => `${x(i).toFixed(1)},${(62 - (60 * t) / top).toFixed(1)}`).join(" ");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points);
  $("chart").replaceChildren(line);
  $("chart-top").textContent = `peak ${top.toFixed(1)}`;
}

function describe(name, { model, target, precision, files, state, graphs, tokenizer }) {
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
    Threads: globalThis.crossOriginIsolated ? "yes" : "no (not isolated)",
  };
  const cells = Object.entries(rows).flatMap(([key, value]) =>
    [["dt", key], ["dd", value]].map(([tag, text]) => Object.assign(document.createElement(tag), { textContent: text })),
  );
  $("facts").replaceChildren(...cells);
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

async function start() {
  const rows = await (await fetch("/bundles.json")).json();
  $("bundle").replaceChildren(...rows.map(({ name, url }) => new Option(name, url)));
  $("bundle").onchange = () => {
    const row = rows.find(({ url }) => url === $("bundle").value);
    if (row) pick(row);
  };
  const pick = (row) => {
    choose(row.provider);
    open({ url: row.url });
  };
  pick(rows[0]);
}

$("form").onsubmit = generate;
$("stop").onclick = () => worker.postMessage({ op: "stop" });
$("backend").onchange = () => chosen && open(chosen);
$("folder").onchange = ({ target }) => {
  if (!target.files.length) return;
  const name = target.files[0].webkitRelativePath.split("/")[0] || "picked files";
  const old = $("bundle").querySelector("[data-picked]");
  old?.remove();
  const option = new Option(name, "", true, true);
  option.dataset.picked = "";
  $("bundle").add(option);
  open({ files: Array.from(target.files) });
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate(event);
};
choose("wasm");
start().catch((error) => handlers.failed({ message: String(error) }));
