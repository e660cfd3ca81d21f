/** The page's side of the worker that runs the model: a promise for each request. */

export class Engine {
  #worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  #waiting = new Map();
  #requests = 0;
  #runs = 0;
  #page;
  #onLoaded;

  /** page: what page.json says.  onLoaded(bytes): told as files arrive.  onFailure(message): the worker itself fails. */
  constructor(page, onLoaded, onFailure) {
    this.#page = page;
    this.#onLoaded = onLoaded;
    this.#worker.onmessage = ({ data }) => this.#receive(data);
    this.#worker.onerror = (event) => onFailure(event.message || "the worker could not be started");
  }

  /** Loads a model's three graphs, and the runtime before the first. */
  load(model) {
    return this.#ask("load", { page: this.#page, model });
  }

  /** Embeds an image, uint8 [3, size, size]; gives the number of its run, and milliseconds. */
  async begin(model, pixels) {
    const run = ++this.#runs;
    const { ms } = await this.#ask("begin", { run, model, pixels, size: this.#page.image_size });
    return { run, ms };
  }

  /** Takes one step of a run; gives logits, halt (halt_prob) and ms. */
  step(run) {
    return this.#ask("step", { run });
  }

  /** Drops a run's state. */
  forget(run) {
    return this.#ask("forget", { run });
  }

  #ask(what, more) {
    const id = ++this.#requests;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, do: what, ...more });
    });
  }

  #receive({ id, result, error, loaded }) {
    if (loaded !== undefined) return this.#onLoaded(loaded);
    const { resolve, reject } = this.#waiting.get(id);
    this.#waiting.delete(id);
    return error === undefined ? resolve(result) : reject(new Error(error));
  }
}
