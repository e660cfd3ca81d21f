/** The recursion, off the page's thread: onnxruntime-web runs embed, step and heads; the page says when.
 *
 * Each request {id, do, …} gets {id, result} or {id, error}; while files arrive, {loaded} bytes are told between.
 * A picture's state stays here between its steps, so that it can go on later.
 */

import * as ort from "../onnxruntime/ort.wasm.bundle.min.js";

const base = new URL("..", import.meta.url);
let names; // of tensors, from page.json
let runtime; // resolves once the WebAssembly is set up
const models = new Map(); // name → sessions of the three graphs, and what passes between them
const runs = new Map(); // number → a picture's model, embedded tensors and state

async function bytesOf(file) {
  const answer = await fetch(new URL(file, base), { cache: "no-cache" });
  if (!answer.ok) throw new Error(`${file} is not there (${answer.status})`);
  const parts = [];
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    postMessage({ loaded: value.length });
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function setUp(wasm) {
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1; // more need headers that a plain static host does not send
  ort.env.wasm.wasmBinary = (await bytesOf(wasm)).buffer;
}

const requests = {
  async load({ page, model }) {
    names = page.tensors;
    runtime ??= setUp(page.runtime.wasm);
    const entries = Object.entries(page.models.find((m) => m.name === model).files);
    const files = await Promise.all([runtime, ...entries.map(([, file]) => bytesOf(file))]);
    const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
    const graphs = {};
    for (const [i, [part]] of entries.entries()) {
      graphs[part] = await ort.InferenceSession.create(files[i + 1], options);
    }
    const state = graphs.step.outputNames.map((name) => name.slice(0, -names.next.length));
    const embedded = graphs.step.inputNames.filter((name) => !state.includes(name));
    models.set(model, { ...graphs, state, embedded });
  },

  async begin({ run, model, pixels, size }) {
    const m = models.get(model);
    const floats = Float32Array.from(pixels, (p) => p / 255);
    const began = performance.now();
    const made = await m.embed.run({ [names.pixels]: new ort.Tensor("float32", floats, [1, 3, size, size]) });
    runs.set(run, { m, embedded: pick(made, m.embedded), state: pick(made, m.state) });
    return { ms: performance.now() - began };
  },

  async step({ run }) {
    const r = runs.get(run);
    const began = performance.now();
    const made = await r.m.step.run({ ...r.embedded, ...r.state });
    r.state = Object.fromEntries(r.m.state.map((name) => [name, made[name + names.next]]));
    const answer = await r.m.heads.run({ [names.answer]: r.state[names.answer] });
    const ms = performance.now() - began;
    return { ms, logits: Array.from(answer[names.logits].data), halt: answer[names.halt_prob].data[0] };
  },

  async forget({ run }) {
    runs.delete(run);
  },
};

const pick = (tensors, some) => Object.fromEntries(some.map((name) => [name, tensors[name]]));

let last = Promise.resolve(); // requests run one after another
onmessage = ({ data }) => {
  last = last.then(async () => {
    try {
      postMessage({ id: data.id, result: await requests[data.do](data) });
    } catch (error) {
      postMessage({ id: data.id, error: String(error?.message ?? error) });
    }
  });
};
