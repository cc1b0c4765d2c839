// One text: ids in, logits out, the state stays inside; and generation, as runtimes/stream.py and generate.py.

import { InputError, LimitError, RuntimeFailure } from "./errors.mjs";
import { Sampler } from "./sampling.mjs";

/** Prompts are fed in pieces of so many tokens, which bounds the memory that activations take. */
const PROMPT_CHUNK = 512;

/** A model with its state, of one sequence. */
export class Stream {
  #cell;
  #model;
  #busy = false;

  constructor(cell, manifest, tokenizer) {
    this.#cell = cell;
    this.#model = manifest.model;
    this.tokenizer = tokenizer;
    this.vocabSize = manifest.model.vocab_size;
    this.maxTokens = manifest.model.max_tokens ?? null;
    this.position = 0;
  }

  /**
   * Feed ids and return the logits after each of them, or after the last ones.
   *
   * @param {ArrayLike<number>} ids at least one
   * @param {{keep?: number}} [options] keep: only the logits of so many last positions; 0 means all
   * @returns {Promise<{shape: number[], data: Float32Array}>} [1,T,V]
   * @throws {InputError} no ids, or one out of range
   * @throws {LimitError} beyond maxTokens; the state is as before
   * @throws {RuntimeFailure} the runtime failed (the state is as before), or a call has not ended yet
   */
  async feed(ids, { keep = 0 } = {}) {
    if (this.#model.input !== undefined && this.#model.input.kind !== "tokens") {
      throw new InputError("this model reads features, not tokens", { fix: "use a cell: bundle.engine.cell(1)" });
    }
    const data = this.#checked(ids);
    if (!Number.isInteger(keep) || keep < 0) throw new InputError("bad number of positions to keep", { got: keep });
    return this.#alone(async () => {
      if (this.#carries) this.#checkLimit(data.length);
      const logits = await this.#cell.run({ dtype: "int64", shape: [1, data.length], data }, keep);
      if (this.#carries) this.position += data.length;
      return logits;
    });
  }

  /** Back to the state before the first token. */
  reset() {
    this.#idle();
    this.#cell.reset();
    this.position = 0;
  }

  /** A copy of the state and the position, from which restore() goes on. */
  save() {
    return this.#alone(async () => ({ position: this.position, tensors: await this.#cell.read() }));
  }

  /** Continue from what save() returned, of this or of another stream of the same bundle. */
  restore(saved) {
    this.#idle();
    this.#cell.write(saved.tensors);
    this.position = saved.position;
  }

  /** Give the device's memory back; the stream can't be used any more. */
  release() {
    this.#idle();
    this.#cell.release();
  }

  /**
   * Feed a prompt, then sample; the stream goes on from where it is.
   *
   * @param {string | ArrayLike<number>} prompt text, or ids
   * @param {import("./xexport.d.ts").GenerateOptions} [options]
   * @returns {Generation} an async iterator over pieces of text
   */
  generate(prompt, options = {}) {
    if (this.#model.form === "whole") {
      throw new InputError("this model reads whole sequences: it can't go on from a prompt");
    }
    const ids = typeof prompt === "string" ? this.tokenizer.encode(prompt) : prompt;
    this.#checkLimit(this.#checked(ids).length);
    return new Generation(this, ids, options);
  }

  get #carries() {
    return this.#model.form !== "whole";
  }

  #checked(ids) {
    if (typeof ids === "string" || ids?.length === undefined) {
      throw new InputError("tokens are ids, not text", { allowed: "an array of ids", fix: "tokenizer.encode(text)" });
    }
    if (ids.length === 0) throw new InputError("no tokens to feed", { allowed: "at least one" });
    return BigInt64Array.from(ids, (id) => {
      if (!Number.isInteger(id) || id < 0 || id >= this.vocabSize) {
        throw new InputError("a token id is out of range", { got: id, allowed: `0 .. ${this.vocabSize - 1}` });
      }
      return BigInt(id);
    });
  }

  #checkLimit(count) {
    if (this.maxTokens === null || this.position + count <= this.maxTokens) return;
    throw new LimitError(`the stream can hold ${this.maxTokens} tokens`, {
      got: `${count} more at position ${this.position}`,
      allowed: `at most ${this.maxTokens - this.position} more`,
      fix: "call reset() or restore(), or export with a larger maximum",
    });
  }

  #idle() {
    if (this.#busy) throw new RuntimeFailure("this stream is running", { fix: "await the call before" });
  }

  async #alone(work) {
    this.#idle();
    this.#busy = true;
    try {
      return await work();
    } finally {
      this.#busy = false;
    }
  }
}

/** An async iterator over pieces of text, each valid Unicode; a piece comes after its token was fed back. */
export class Generation {
  #pieces;

  constructor(stream, prompt, { maxTokens = 64, stop = [], signal, ...sampling } = {}) {
    if (!Number.isInteger(maxTokens) || maxTokens < 0) {
      throw new InputError("bad maxTokens", { got: maxTokens, allowed: "an integer, 0 or more" });
    }
    const stops = Array.isArray(stop) ? stop : [stop];
    if (stops.some((s) => s === "" || !["string", "number"].includes(typeof s))) {
      throw new InputError("bad stop", { got: JSON.stringify(stop), allowed: "texts that are not empty, or ids" });
    }
    const texts = stops.filter((s) => typeof s === "string");
    const ends = new Set([...stops.filter((s) => typeof s === "number"), ...stream.tokenizer.endIds]);
    /** ids generated so far */
    this.ids = [];
    /** counts and milliseconds so far */
    this.stats = { promptTokens: prompt.length, promptMs: 0, newTokens: 0, decodeMs: 0 };
    const known = Math.min(stream.vocabSize, stream.tokenizer.vocabSize ?? stream.vocabSize);
    this.#pieces = this.#run(stream, prompt, maxTokens, new Sampler(sampling), texts, ends, known, signal);
  }

  [Symbol.asyncIterator]() {
    return this.#pieces;
  }

  async *#run(stream, prompt, left, sampler, texts, ends, known, signal) {
    const { stats } = this;
    const decoder = stream.tokenizer.decoder();
    const held = new StopSearch(texts);
    let began = performance.now();
    let logits;
    for (let at = 0; at < prompt.length && !signal?.aborted; at += PROMPT_CHUNK) {
      logits = await stream.feed(prompt.slice(at, at + PROMPT_CHUNK), { keep: 1 });
    }
    stats.promptMs = performance.now() - began;
    while (left-- > 0 && !signal?.aborted) {
      began = performance.now();
      const id = sampler.choose(logits.data.subarray(0, known));
      if (ends.has(id)) break;
      let full = null;
      try {
        logits = await stream.feed([id], { keep: 1 });
      } catch (error) {
        if (!(error instanceof LimitError)) throw error;
        full = error;
      }
      this.ids.push(id);
      stats.newTokens++;
      stats.decodeMs += performance.now() - began;
      const piece = held.push(decoder.push(id));
      if (piece) yield piece;
      if (held.found) return;
      if (full) {
        yield held.push(decoder.flush()) + held.flush();
        if (left > 0) throw full;
        return;
      }
    }
    const rest = held.push(decoder.flush()) + held.flush();
    if (rest) yield rest;
  }
}

/** Holds back text that may be the beginning of a stop text; drops that and what follows. */
class StopSearch {
  #stops;
  #held = "";
  found = false;

  constructor(stops) {
    this.#stops = stops;
  }

  push(text) {
    if (this.#stops.length === 0 || this.found) return this.found ? "" : text;
    this.#held += text;
    const places = this.#stops.map((s) => this.#held.indexOf(s)).filter((at) => at >= 0);
    this.found = places.length > 0;
    return this.#take(this.found ? Math.min(...places) : this.#held.length - this.#overlap());
  }

  flush() {
    return this.found ? "" : this.#take(this.#held.length);
  }

  #take(count) {
    const out = this.#held.slice(0, count);
    this.#held = this.found ? "" : this.#held.slice(count);
    return out;
  }

  /** Length of the longest end of the held text that begins a stop text. */
  #overlap() {
    const longest = Math.min(this.#held.length, Math.max(...this.#stops.map((s) => s.length)) - 1);
    for (let size = longest; size > 0; size--) {
      const end = this.#held.slice(-size);
      if (this.#stops.some((s) => s.startsWith(end))) return size;
    }
    return 0;
  }
}
