// The graph of a bundle in onnxruntime-web, and the state of one stream, which stays where the graph computes:
// every state tensor that a call returns is what the next call is given. On WebGPU it never leaves the device.

import { InputError, RuntimeFailure, brief } from "./errors.mjs";
import { KEEP_INPUT } from "./manifest.mjs";

const ARRAYS = { float32: Float32Array, float16: Uint16Array, int64: BigInt64Array, int32: Int32Array };

/** An opened graph (one a length, where a target has fixed shapes); any number of cells may share it. */
export class Engine {
  /**
   * @param {object} ort the module onnxruntime-web
   * @param {import("./xexport.d.ts").Manifest} manifest
   * @param {string} provider "wasm" or "webgpu"
   * @param {Map<number, object>} sessions length -> session; length 0 takes any. With both, a session of one length
   *   takes the calls of one sequence that are exactly as long
   */
  constructor(ort, manifest, provider, sessions) {
    this.ort = ort;
    this.manifest = manifest;
    this.provider = provider;
    this.sessions = sessions;
  }

  /** Lengths of one call, largest first; `[0]` if a call may have any. */
  get lengths() {
    return this.sessions.has(0) ? [0] : Array.from(this.sessions.keys()).sort((a, b) => b - a);
  }

  /** The session for a call: its own length's, if there is one. */
  session(batch, length) {
    return (batch === 1 && this.sessions.get(length)) || this.sessions.get(0);
  }

  cell(batch) {
    if (batch !== 1 && !this.sessions.has(0)) {
      throw new InputError("this bundle's graphs are of one sequence", { got: `batch ${batch}`, allowed: 1 });
    }
    return new Cell(this, batch);
  }

  async release() {
    for (const session of this.sessions.values()) await session.release();
  }
}

/** The state of `batch` parallel sequences. */
export class Cell {
  #engine;
  #batch;
  #state = {};

  constructor(engine, batch) {
    this.#engine = engine;
    this.#batch = batch;
    this.reset();
  }

  /** Whether the graph computes only the logits that are asked for. */
  get keeps() {
    return Array.from(this.#engine.sessions.values()).every((s) => s.inputNames.includes(KEEP_INPUT));
  }

  /**
   * Run ids or features; the state moves on only if every part of it succeeds.
   *
   * @param {{dtype: string, shape: number[], data: ArrayLike<number> | BigInt64Array}} inputs [B,T] or [B,T,F]
   * @param {number} keep logits of so many of the last positions; 0 means all
   * @returns {Promise<{shape: number[], data: Float32Array}>} [B,positions,V]
   * @throws {RuntimeFailure} onnxruntime-web failed
   */
  async run(inputs, keep = 0) {
    const before = this.#state;
    let state = before;
    const found = [];
    try {
      for (const part of this.#parts(inputs)) {
        const [logits, next] = await this.#call(part, state, keep);
        if (state !== before) dispose(state);
        state = next;
        found.push(logits);
      }
    } catch (error) {
      if (state !== before) dispose(state);
      throw new RuntimeFailure("onnxruntime-web failed to run the graph", { got: brief(error) });
    }
    if (state !== before) dispose(before);
    this.#state = state;
    return last(found, keep);
  }

  /** A copy of every state tensor. */
  async read() {
    const copies = {};
    for (const { name } of this.#specs) {
      const tensor = this.#state[name];
      const data = tensor.location === "cpu" ? tensor.data : await tensor.getData();
      copies[name] = { dtype: tensor.type, shape: Array.from(tensor.dims), data: data.slice() };
    }
    return copies;
  }

  /** Overwrite every state tensor. */
  write(tensors) {
    const made = {};
    for (const { name, dtype, shape } of this.#specs) {
      const tensor = tensors[name];
      const dims = shape.map((d) => (d === "B" ? this.#batch : d));
      if (tensor?.dtype !== dtype || String(tensor.shape) !== String(dims)) {
        throw new InputError(`state ${name} doesn't fit`, {
          got: tensor === undefined ? "nothing" : `${tensor.dtype} [${tensor.shape}]`,
          allowed: `${dtype} [${dims}]`,
        });
      }
      made[name] = new this.#engine.ort.Tensor(dtype, tensor.data.slice(), dims);
    }
    dispose(this.#state);
    this.#state = made;
  }

  /** Back to the state before the first token. */
  reset() {
    const first = {};
    for (const { name, dtype, shape, init } of this.#specs) {
      const dims = shape.map((d) => (d === "B" ? this.#batch : d));
      if (dtype === "float16" && init !== 0) {
        throw new RuntimeFailure("a float16 state that does not begin at 0 is not supported", { got: name });
      }
      const data = new ARRAYS[dtype](dims.reduce((a, b) => a * b, 1));
      first[name] = { dtype, shape: dims, data: data.fill(dtype === "int64" ? BigInt(init) : init) };
    }
    this.write(first);
  }

  /** Give the device's memory back; the cell can't be used any more. */
  release() {
    dispose(this.#state);
    this.#state = {};
  }

  get #specs() {
    return this.#engine.manifest.state;
  }

  /** Consecutive parts of the lengths that there are graphs for; the whole where any length will do. */
  *#parts({ dtype, shape, data }) {
    const [batch, length, ...rest] = shape;
    const width = rest.reduce((a, b) => a * b, 1);
    let at = 0;
    for (const size of this.#engine.lengths) {
      for (const step = size || length; at + step <= length; at += step) {
        const part = step === length ? data : data.slice(at * width, (at + step) * width);
        yield new this.#engine.ort.Tensor(dtype, part, [batch, step, ...rest]);
      }
    }
    if (at < length) {
      throw new InputError("no graph takes an input of this length", {
        got: length,
        allowed: `sums of ${this.#engine.lengths.join(", ")}`,
      });
    }
  }

  async #call(tensor, state, keep) {
    const { manifest, ort } = this.#engine;
    const session = this.#engine.session(tensor.dims[0], tensor.dims[1]);
    const feeds = { ...state, [manifest.model.input?.name ?? "tokens"]: tensor };
    if (session.inputNames.includes(KEEP_INPUT)) {
      feeds[KEEP_INPUT] = new ort.Tensor("int64", BigInt64Array.of(BigInt(keep)), [1]);
    }
    for (const name of Object.keys(feeds)) if (!session.inputNames.includes(name)) delete feeds[name];
    const out = await session.run(feeds);
    const next = {};
    for (const { name, output } of manifest.state) next[name] = out[output];
    const data = out.logits.location === "cpu" ? out.logits.data : await out.logits.getData(true);
    return [{ shape: Array.from(out.logits.dims), data }, next];
  }
}

/** What lies on the device is given back; what lies in JavaScript's memory is collected anyway. */
function dispose(state) {
  for (const tensor of Object.values(state)) if (tensor.location !== "cpu") tensor.dispose();
}

/** The parts behind one another on axis 1, less what was not asked for. */
function last(parts, keep) {
  const [batch, , vocab] = parts[0].shape;
  const positions = parts.reduce((sum, part) => sum + part.shape[1], 0);
  const wanted = keep === 0 ? positions : Math.min(keep, positions);
  if (parts.length === 1 && wanted === positions) return parts[0];
  const data = new Float32Array(batch * wanted * vocab);
  for (let b = 0; b < batch; b++) {
    let end = wanted;
    for (let i = parts.length - 1; i >= 0 && end > 0; i--) {
      const count = Math.min(parts[i].shape[1], end);
      const stop = (b + 1) * parts[i].shape[1] * vocab;
      data.set(parts[i].data.subarray(stop - count * vocab, stop), (b * wanted + end - count) * vocab);
      end -= count;
    }
  }
  return { shape: [batch, wanted, vocab], data };
}
