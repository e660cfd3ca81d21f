/** A picture's way through the steps, and where it halts: no steps are computed here, and nothing is drawn. */

/** Probabilities of logits. */
export function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = logits.map((v) => Math.exp(v - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((v) => v / sum);
}

/** The steps that one model has taken for one picture so far. */
export class Trajectory {
  constructor(run, embedMs) {
    this.run = run; // its number in the engine
    this.embedMs = embedMs;
    this.steps = []; // {probabilities, top, halt, ms}, from step 1 on
  }

  add({ logits, halt, ms }) {
    const probabilities = softmax(logits);
    this.steps.push({ probabilities, top: probabilities.indexOf(Math.max(...probabilities)), halt, ms });
  }

  /** Where it ends with at most `depth` steps: {used, halted, done}; `done` is false while a step is still missing.
   *
   * It halts once halt_prob exceeds the threshold, both as float32; a threshold of 1 or more never halts.
   */
  end(depth, threshold) {
    const bound = threshold < 1 ? Math.fround(threshold) : Infinity;
    const taken = Math.min(depth, this.steps.length);
    for (let i = 0; i < taken; i++) {
      if (this.steps[i].halt > bound) return { used: i + 1, halted: true, done: true };
    }
    return { used: taken, halted: false, done: taken === depth };
  }
}
