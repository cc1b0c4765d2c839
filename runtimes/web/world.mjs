// The RWKV World tokenizer (runtimes/world.py): from left to right the longest entry that fits is taken.
// The vocabulary is a text of lines `ID LITERAL LENGTH`; a literal is a Python string or bytes, read by hand.

import { BundleError, InputError } from "./errors.mjs";
import { utf8 } from "./tokenizers.mjs";

const END = 0;
const LINE = /^(\d+) (b?)(['"])(.*)\3 (\d+)$/su;
const ESCAPE = /\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|([^]))/gu;
const SINGLE = { n: "\n", r: "\r", t: "\t", a: "\x07", b: "\b", f: "\f", v: "\v", 0: "\0" };

/** Text <-> ids of a World vocabulary. */
export class WorldTokenizer {
  kind = "rwkv-world";
  readsText = true;
  endIds = new Set([END]);
  #root = new Map(); // byte -> [id of the entry that ends here or -1, Map of what follows]
  #bytes;
  #decoder;

  /**
   * @param {Map<number, Uint8Array>} table id -> bytes
   * @param {(bytesOf: (id: number) => Uint8Array) => import("./xexport.d.ts").Decoder} decoder
   */
  constructor(table, decoder) {
    this.#bytes = table;
    this.#decoder = decoder;
    let top = 0;
    for (const [id, bytes] of table) {
      this.#add(id, bytes);
      if (id > top) top = id;
    }
    this.vocabSize = top + 1;
  }

  /**
   * Greedy longest matches.
   *
   * @throws {InputError} lone surrogates, or a byte that no entry begins with
   */
  encode(text) {
    const data = utf8(text);
    const ids = [];
    for (let at = 0; at < data.length; ) {
      let [found, end] = [-1, at];
      for (let level = this.#root, i = at; i < data.length; i++) {
        const node = level.get(data[i]);
        if (node === undefined) break;
        if (node[0] >= 0) [found, end] = [node[0], i + 1];
        level = node[1];
      }
      if (found < 0) throw new InputError("the vocabulary has no entry for a byte of the text", { got: data[at] });
      ids.push(found);
      at = end;
    }
    return ids;
  }

  decoder() {
    return this.#decoder((id) => {
      if (id === END) return new Uint8Array(0);
      const bytes = this.#bytes.get(id);
      if (bytes === undefined) throw new InputError("a token id is not in the vocabulary", { got: id });
      return bytes;
    });
  }

  #add(id, bytes) {
    let level = this.#root;
    bytes.forEach((byte, i) => {
      if (!level.has(byte)) level.set(byte, [-1, new Map()]);
      const node = level.get(byte);
      if (i === bytes.length - 1) node[0] = id;
      level = node[1];
    });
  }
}

/**
 * Id -> bytes of a vocabulary.
 *
 * @param {string} text the file
 * @returns {Map<number, Uint8Array>}
 * @throws {BundleError} a line is not of the format; names its number
 */
export function parseVocabulary(text) {
  const table = new Map();
  text.split("\n").forEach((line, index) => {
    if (line.trim()) {
      const [id, bytes] = entry(line.replace(/\r$/, ""), index + 1);
      if (table.has(id)) throw new BundleError("the vocabulary has an id twice", { got: `line ${index + 1}: ${id}` });
      table.set(id, bytes);
    }
  });
  if (table.size === 0) throw new BundleError("the vocabulary is empty");
  return table;
}

function entry(line, number) {
  const match = LINE.exec(line);
  const bytes = match && literal(match[4], match[2] === "b");
  if (!bytes || bytes.length === 0 || bytes.length !== Number(match[5]) || Number(match[1]) === END) {
    throw new BundleError("not a line of a World vocabulary", {
      got: `line ${number}: ${line.slice(0, 60)}`,
      allowed: "ID 'TEXT' LENGTH",
    });
  }
  return [Number(match[1]), bytes];
}

/** The bytes between the quotes of a Python literal; in a bytes literal a character is a byte. */
function literal(body, isBytes) {
  const text = body.replace(ESCAPE, (whole, hex, short, long, octal, other) => {
    const code = hex ?? (isBytes ? undefined : (short ?? long));
    if (code !== undefined) return String.fromCodePoint(Number.parseInt(code, 16));
    if (octal !== undefined) return String.fromCodePoint(Number.parseInt(octal, 8));
    if (other !== undefined) return SINGLE[other] ?? ("\\'\"".includes(other) ? other : whole);
    return whole;
  });
  return isBytes ? Uint8Array.from(text, (c) => c.codePointAt(0)) : new TextEncoder().encode(text);
}
