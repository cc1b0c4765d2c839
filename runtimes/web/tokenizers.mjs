// Text to token ids and back, as runtimes/tokenizers.py: the manifest names the kind. Nothing is evaluated.

import { BundleError, InputError } from "./errors.mjs";
import { readEntry } from "./manifest.mjs";
import { WorldTokenizer, parseVocabulary } from "./world.mjs";

const NONE = new Set();

/** Joins the bytes of ids to characters; an unfinished one waits for its other bytes. */
export class ByteDecoder {
  #bytesOf;
  #utf8 = new TextDecoder("utf-8", { ignoreBOM: true });

  /** @param {(id: number) => Uint8Array} bytesOf the bytes of an id */
  constructor(bytesOf) {
    this.#bytesOf = bytesOf;
  }

  /** The text that became certain with this id; may be empty inside a character. */
  push(id) {
    return this.#utf8.decode(this.#bytesOf(id), { stream: true });
  }

  /** What is left at the end; an unfinished character becomes U+FFFD. */
  flush() {
    return this.#utf8.decode();
  }
}

/** One token a byte of UTF-8. */
class BytesTokenizer {
  kind = "bytes";
  readsText = true;
  vocabSize = 256;
  endIds = NONE;

  encode(text) {
    return Array.from(utf8(text));
  }

  decoder() {
    return new ByteDecoder((id) => {
      if (!(id >= 0 && id < 256)) throw new InputError("a token id is no byte", { got: id, allowed: "0 .. 255" });
      return Uint8Array.of(id);
    });
  }
}

/** Ids in, ids out. */
class NoTokenizer {
  kind = "none";
  readsText = false;
  vocabSize = null;
  endIds = NONE;

  encode(text) {
    throw new InputError("this bundle has no tokenizer, so it can't read text", {
      got: `text of ${text.length} characters`,
      allowed: "an array of token ids",
    });
  }

  decoder() {
    return { push: (id) => `${id} `, flush: () => "" };
  }
}

const DNA_WORDS = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", ..."ACGTN"];

/** One token a letter (runtimes/dna.py); [SEP] ends a text. */
class DnaTokenizer {
  kind = "dna";
  readsText = true;
  vocabSize = DNA_WORDS.length;
  endIds = new Set([1]);

  encode(text) {
    const letters = Array.from(text.replace(/\s/gu, ""));
    const ids = letters.map((c) => ("ACGTN".includes(c) ? DNA_WORDS.indexOf(c) : 6));
    if (ids.length > 0 && ids.every((id) => id === 6)) {
      throw new InputError("the text is no DNA", { got: text.slice(0, 20), allowed: "the letters A, C, G, T and N" });
    }
    return ids;
  }

  decoder() {
    return { push: (id) => DNA_WORDS[id] ?? "\ufffd", flush: () => "" };
  }
}

/**
 * Ids written as numbers between spaces or commas.
 *
 * @throws {InputError} something else is among them
 */
export function parseIds(text) {
  const words = text.split(/[\s,]+/u).filter(Boolean);
  const odd = words.find((word) => !/^[0-9]+$/.test(word));
  if (odd !== undefined) {
    throw new InputError("not a token id", { got: odd, allowed: "whole numbers between spaces or commas" });
  }
  return words.map(Number);
}

/**
 * The UTF-8 of a text.
 *
 * @throws {InputError} it has lone surrogates, which UTF-8 can't hold
 */
export function utf8(text) {
  if (/\p{Surrogate}/u.test(text)) throw new InputError("the text can't be written as UTF-8", { got: "lone surrogates" });
  return new TextEncoder().encode(text);
}

const KINDS = {
  bytes: async () => new BytesTokenizer(),
  dna: async () => new DnaTokenizer(),
  none: async () => new NoTokenizer(),
  "rwkv-world": async (manifest, source, verify) => {
    const name = manifest.tokenizer.file;
    const entry = manifest.files.find((f) => f.path === name);
    if (entry === undefined) throw new BundleError("the manifest doesn't list its tokenizer", { got: name });
    const bytes = await readEntry(source, entry, { verify });
    return new WorldTokenizer(parseVocabulary(new TextDecoder().decode(bytes)), (id) => new ByteDecoder(id));
  },
};

/**
 * The tokenizer that a manifest names.
 *
 * @returns {Promise<import("./xexport.d.ts").Tokenizer>}
 * @throws {BundleError} its file is missing or damaged
 * @throws {InputError} a kind that this package does not know, when text is first given to it
 */
export async function loadTokenizer(manifest, source, verify) {
  const kind = manifest.tokenizer?.kind ?? "none";
  const make = KINDS[kind];
  return make === undefined ? new UnknownTokenizer(kind) : make(manifest, source, verify);
}

/** A tokenizer of the Python side alone: the model still runs on ids. */
class UnknownTokenizer extends NoTokenizer {
  constructor(kind) {
    super();
    this.kind = kind;
  }

  encode(text) {
    throw new InputError(`this package can't read text with a tokenizer of kind ${this.kind}`, {
      got: `text of ${text.length} characters`,
      allowed: Object.keys(KINDS).join(", "),
      fix: "encode the text with another library (a tokenizer.json: npm @huggingface/tokenizers) and pass the ids",
    });
  }
}
