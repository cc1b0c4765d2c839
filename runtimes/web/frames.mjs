// Frames of the worker protocol (runtimes/wire.py): u32 length, a JSON header, the raw bytes of its tensors.

const ARRAYS = { float32: Float32Array, float16: Uint16Array, int64: BigInt64Array, int32: Int32Array };

/**
 * The frames that come in, one after another; ends where the stream ends.
 *
 * @param {AsyncIterable<Uint8Array>} source
 * @yields {{header: object, tensors: Record<string, {dtype: string, shape: number[], data: object}>}}
 * @throws {Error} the stream ends inside a frame, or what came is no frame
 */
export async function* readFrames(source) {
  const reader = new Reader(source);
  for (let head = await reader.take(4, true); head !== null; head = await reader.take(4, true)) {
    const length = new DataView(head.buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(await reader.take(length)));
    const tensors = {};
    for (const { name, dtype, shape } of header.tensors ?? []) {
      const kind = ARRAYS[dtype];
      if (kind === undefined) throw new Error(`a tensor of dtype ${dtype}`);
      const count = shape.reduce((a, b) => a * b, 1);
      const bytes = await reader.take(count * kind.BYTES_PER_ELEMENT);
      tensors[name] = { dtype, shape, data: new kind(bytes.buffer) };
    }
    yield { header, tensors };
  }
}

/**
 * Write one frame.
 *
 * @param {{write: (bytes: Uint8Array) => unknown}} out
 * @param {object} header
 * @param {Record<string, {dtype: string, shape: number[], data: ArrayBufferView}>} tensors
 */
export function writeFrame(out, header, tensors = {}) {
  const listed = Object.entries(tensors).map(([name, { dtype, shape }]) => ({ name, dtype, shape }));
  const text = new TextEncoder().encode(JSON.stringify({ ...header, tensors: listed }));
  const head = new Uint8Array(4 + text.length);
  new DataView(head.buffer).setUint32(0, text.length, true);
  head.set(text, 4);
  out.write(head);
  for (const { data } of Object.values(tensors)) {
    out.write(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
}

/** Takes exact counts of bytes from a stream of parts. */
class Reader {
  #parts;
  #held = new Uint8Array(0);

  constructor(source) {
    this.#parts = source[Symbol.asyncIterator]();
  }

  /** `count` bytes in a buffer of their own; null where the stream has ended, if it may. */
  async take(count, mayEnd = false) {
    const bytes = new Uint8Array(count);
    for (let at = 0; at < count; ) {
      if (this.#held.length === 0) {
        const { done, value } = await this.#parts.next();
        if (done && mayEnd && at === 0) return null;
        if (done) throw new Error("the stream ended inside a frame");
        this.#held = value;
      }
      const part = this.#held.subarray(0, count - at);
      bytes.set(part, at);
      at += part.length;
      this.#held = this.#held.subarray(part.length);
    }
    return bytes;
  }
}
