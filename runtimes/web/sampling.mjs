// Choosing the next token: the definition of runtimes/sampling.py. Greedy choices are the same; sampled ones
// have the same distribution but another random generator. Nucleus sampling: arXiv 1904.09751, section 3.1.

import { InputError, RuntimeFailure } from "./errors.mjs";

/** How the next token is chosen. */
export class Sampler {
  /**
   * @param {{temperature?: number, topP?: number, topK?: number, seed?: number}} [options] temperature 0 is
   *     greedy; topP 1 and topK 0 keep every token; without a seed every text is another
   * @throws {InputError} a value out of its range
   */
  constructor({ temperature = 1, topP = 1, topK = 0, seed } = {}) {
    if (!(temperature >= 0 && Number.isFinite(temperature))) {
      throw new InputError("bad temperature", { got: temperature, allowed: "0 (greedy) or more, finite" });
    }
    if (!(topP > 0 && topP <= 1)) throw new InputError("bad topP", { got: topP, allowed: "more than 0, at most 1" });
    if (!Number.isInteger(topK) || topK < 0) {
      throw new InputError("bad topK", { got: topK, allowed: "an integer, 0 (all) or more" });
    }
    if (seed !== undefined && (!Number.isInteger(seed) || seed < 0)) {
      throw new InputError("bad seed", { got: seed, allowed: "an integer, 0 or more" });
    }
    this.temperature = temperature;
    this.topP = topP;
    this.topK = topK;
    this.random = seed === undefined ? Math.random : seeded(seed);
  }

  /**
   * The next id.
   *
   * @param {Float32Array} logits [V]
   * @returns {number}
   * @throws {RuntimeFailure} a logit is NaN or +infinity
   */
  choose(logits) {
    const best = argmax(logits);
    if (this.temperature === 0) return best;
    const chances = probabilities(logits, this, best);
    const draw = this.random();
    let sum = 0;
    let last = best;
    for (let i = 0; i < chances.length; i++) {
      if (chances[i] === 0) continue;
      last = i;
      sum += chances[i];
      if (draw < sum) return i;
    }
    return last; // rounding left the sum a little below 1
  }
}

/**
 * The distribution that a sampler draws from; ties at a border are broken by the lower id.
 *
 * @param {Float32Array} logits [V]
 * @param {Sampler} sampler of a temperature above 0
 * @param {number} best the place of the largest logit
 * @returns {Float64Array} [V], which sums to 1
 */
export function probabilities(logits, { temperature, topP, topK }, best = argmax(logits)) {
  const chances = Float64Array.from(logits, (x) => Math.exp((x - logits[best]) / temperature));
  scale(chances, chances);
  if (topK === 0 && topP >= 1) return chances;
  const order = Array.from(chances.keys()).sort((a, b) => chances[b] - chances[a] || a - b);
  let keep = topK === 0 ? order.length : Math.min(topK, order.length);
  if (topP < 1) {
    let mass = 0;
    const sums = order.slice(0, keep).map((i) => (mass += chances[i]));
    keep = sums.findIndex((sum) => sum >= topP * mass) + 1; // of what top-k left, as the two compose in order
  }
  const kept = new Float64Array(chances.length);
  for (const i of order.slice(0, keep)) kept[i] = chances[i];
  scale(kept, kept);
  return kept;
}

function scale(values, out) {
  const sum = values.reduce((a, b) => a + b, 0);
  for (let i = 0; i < values.length; i++) out[i] = values[i] / sum;
}

/** The first place of the largest logit. */
function argmax(logits) {
  let best = 0;
  let bad = logits.length === 0;
  for (let i = 0; i < logits.length; i++) {
    if (Number.isNaN(logits[i])) bad = true;
    if (logits[i] > logits[best]) best = i;
  }
  if (bad || !Number.isFinite(logits[best])) {
    throw new RuntimeFailure("the model's logits are not finite", {
      got: bad ? "NaN" : logits[best],
      fix: "run `xexport validate` on the bundle; a weight or the state has overflowed",
    });
  }
  return best;
}

/** Numbers in [0, 1) from a seed: a Weyl sequence through a 32-bit finaliser, two draws a number. */
function seeded(seed) {
  let state = (seed ^ Math.floor(seed / 2 ** 32)) >>> 0;
  const word = () => {
    state = (state + 0x9e3779b9) >>> 0;
    let x = state;
    x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
    return (x ^ (x >>> 16)) >>> 0;
  };
  return () => ((word() >>> 5) * 2 ** 26 + (word() >>> 6)) / 2 ** 53;
}
