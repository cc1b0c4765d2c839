// Text to token ids and back, as runtimes/tokenizers.py: the manifest names the kind. Nothing is evaluated.

import { BundleError, InputError, RuntimeFailure, brief } from "./errors.mjs";
import { HuggingFaceTokenizer } from "./huggingface.mjs";
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
  "rwkv-world": async (manifest, source, { verify }) => {
    const bytes = await readFile(manifest, source, verify);
    return new WorldTokenizer(parseVocabulary(new TextDecoder().decode(bytes)), (id) => new ByteDecoder(id));
  },
  huggingface: async (manifest, source, { verify, tokenizers }) => {
    if (tokenizers === undefined) {
      return new AbsentTokenizer("huggingface", "pass tokenizers: the module @huggingface/tokenizers");
    }
    const bytes = await readFile(manifest, source, verify);
    return new HuggingFaceTokenizer(await loaded(tokenizers), bytes, manifest.tokenizer.end ?? []);
  },
};

async function loaded(tokenizers) {
  if (typeof tokenizers !== "function") return tokenizers;
  try {
    return await tokenizers();
  } catch (error) {
    if (error instanceof RuntimeFailure) throw error;
    throw new RuntimeFailure("what reads a tokenizer.json, the npm package @huggingface/tokenizers, can't be loaded", {
      got: brief(error),
      fix: "python -m xexport.runtimes.environments install web",
    });
  }
}

/** The file of a tokenizer. */
function readFile(manifest, source, verify) {
  const name = manifest.tokenizer.file;
  const entry = manifest.files.find((f) => f.path === name);
  if (entry === undefined) throw new BundleError("the manifest doesn't list its tokenizer", { got: name });
  return readEntry(source, entry, { verify });
}

/**
 * The tokenizer that a manifest names.
 *
 * @param {import("./xexport.d.ts").Manifest} manifest
 * @param {import("./xexport.d.ts").Source} source where its file is
 * @param {{verify: boolean, tokenizers?: object | (() => Promise<object>)}} options what reads a tokenizer.json
 * @returns {Promise<import("./xexport.d.ts").Tokenizer>}
 * @throws {BundleError} its file is missing or damaged
 * @throws {RuntimeFailure} what reads a tokenizer.json can't be loaded
 */
export async function loadTokenizer(manifest, source, options) {
  const kind = manifest.tokenizer?.kind ?? "none";
  if (!Object.hasOwn(KINDS, kind)) {
    return new AbsentTokenizer(kind, "take the version of this package that belongs to the xexport that wrote the bundle");
  }
  return KINDS[kind](manifest, source, options);
}

/** One that can't be had here: the model still runs on ids. */
class AbsentTokenizer extends NoTokenizer {
  #fix;

  constructor(kind, fix) {
    super();
    this.kind = kind;
    this.#fix = fix;
  }

  encode(text) {
    throw new InputError(`text can't be read here with a tokenizer of kind ${this.kind}`, {
      got: `text of ${text.length} characters`,
      allowed: "an array of token ids",
      fix: this.#fix,
    });
  }
}
