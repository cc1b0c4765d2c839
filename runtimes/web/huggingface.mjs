// A Hugging Face tokenizer.json (runtimes/huggingface.py), through the npm package @huggingface/tokenizers.

import { BundleError, InputError, brief } from "./errors.mjs";
import { utf8 } from "./tokenizers.mjs";

const UNFINISHED = "\ufffd";
const LONGEST = 16; // ids held back at most: a character has four bytes, and a byte may be an id

/** Text <-> ids of a tokenizer.json. Special tokens are added where the file says so, and are no text. */
export class HuggingFaceTokenizer {
  kind = "huggingface";
  readsText = true;
  #made;

  /**
   * @param {object} library the module @huggingface/tokenizers
   * @param {Uint8Array} bytes the file
   * @param {number[]} endIds ids that end a text
   * @throws {BundleError} the file is no tokenizer.json, or of a kind that the library does not know
   */
  constructor(library, bytes, endIds) {
    try {
      this.#made = new library.Tokenizer(JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes)), {});
    } catch (error) {
      throw new BundleError("the bundle's tokenizer.json can't be read", { got: brief(error) });
    }
    this.endIds = new Set(endIds);
    let top = -1;
    for (const id of this.#made.get_vocab().values()) top = Math.max(top, id);
    this.vocabSize = top + 1;
  }

  /**
   * @param {string} text
   * @returns {number[]}
   * @throws {InputError} lone surrogates
   */
  encode(text) {
    utf8(text);
    try {
      // a character that no token stands for, in a vocabulary without a token for the unknown, is left out
      return this.#made.encode(text).ids.filter((id) => id !== undefined);
    } catch (error) {
      throw new InputError("the tokenizer can't encode the text", { got: brief(error) });
    }
  }

  /** Ids to text, without special tokens; ids that it does not know are left out. */
  decode(ids) {
    const known = ids.filter((id) => this.#made.id_to_token(id) !== undefined);
    if (known.length === 0) return "";
    return this.#made.decode(known, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }

  decoder() {
    return new Incremental(this);
  }
}

/**
 * Text of a growing list of ids, by the difference between two ends of it: what an id stands for can depend on the
 * ids before it and, inside a character, on those after it. So the last piece is decoded together with the next, and
 * text that ends in the sign of an unfinished character waits.
 */
class Incremental {
  #tokenizer;
  #ids = [];
  #given = 0; // ids of the list whose text was handed out

  constructor(tokenizer) {
    this.#tokenizer = tokenizer;
  }

  push(id) {
    this.#ids.push(id);
    const whole = this.#tokenizer.decode(this.#ids);
    if (whole.endsWith(UNFINISHED) && this.#ids.length - this.#given < LONGEST) return "";
    return this.#handOut(whole);
  }

  flush() {
    const text = this.#handOut(this.#tokenizer.decode(this.#ids));
    this.#ids = [];
    this.#given = 0;
    return text;
  }

  #handOut(whole) {
    const old = this.#tokenizer.decode(this.#ids.slice(0, this.#given));
    // by characters, as Python counts: half of a surrogate pair is no text
    const text = Array.from(whole).slice(Array.from(old).length).join("");
    if (text) this.#ids = this.#ids.slice(this.#given); // an id without text does not replace the piece before it
    this.#given = this.#ids.length;
    return text;
  }
}
