/** The page: which picture, how deep, which threshold, which model; and what is drawn of it.
 *
 * One loop computes whatever the present settings still lack, the chosen picture first, then the other ones.  So a slider
 * only changes a setting: a step that is there already is not taken again, and one that is missing is taken from where the
 * picture stopped.
 */

import { drawBars } from "./bars.js";
import { Camera } from "./camera.js";
import { drawSteps, listenToSteps } from "./chart.js";
import { Engine } from "./engine.js";
import { Gallery } from "./gallery.js";
import { draw, pixelsOf, pixelsOfFile } from "./pictures.js";
import { Trajectory } from "./recursion.js";

const STEP_TIME = 550; // milliseconds that each step of a new picture stays on the screen; computing it takes less
const SHARE_NAME = "softmax share"; // no halt_prob: both are between 0 and 1, and seldom alike
const MOST_OWN = 60; // pictures of the user that are kept

const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const narrow = matchMedia("(max-width: 700px)");

let page; // what page.json says
let engine;
let depth;
let threshold;
let model; // name of the one in use
let chosen = null; // a picture: {name, group, label, pixels, trajectories}
let shown = 1; // the step whose answer is shown
let playing = null; // timer of the steps of a new picture
let working = false;
let said = "";
const pictures = [];
const loadedModels = new Map(); // name → promise
const camera = new Camera();
const gallery = new Gallery((picture) => {
  stopCamera();
  choose(picture);
  // Where panels stand below each other, the steps may be below the screen.
  if (narrow.matches) $("steps").scrollIntoView({ block: "nearest", behavior: still.matches ? "auto" : "smooth" });
});

async function start() {
  document.body.classList.add("running");
  tell("Loading the page’s settings …");
  page = await (await fetchFile("page.json")).json();
  depth = page.steps;
  threshold = page.halt_threshold;
  model = page.models[0].name;
  setKnobs();
  listen();
  engine = new Engine(page, loadedBytes, fail);
  const first = loadModel(model);
  await addGallery();
  await first;
  $("page").dataset.state = "ready";
  $("loading").hidden = true;
  if (pictures.length && !chosen) choose(pictures[page.first]);
  refresh();
  work();
}

async function fetchFile(file) {
  const answer = await fetch(file, { cache: "no-cache" });
  if (!answer.ok) throw new Error(`${file} is not there (${answer.status}): copy the whole folder`);
  return answer;
}

function tell(text) {
  $("status").textContent = text;
}

let loaded = 0;
function loadedBytes(bytes) {
  if ($("page").dataset.state !== "loading") return;
  loaded += bytes;
  const expected = page.runtime.bytes + page.models[0].bytes;
  $("progress").value = Math.min(1, loaded / expected);
  tell(
    loaded < expected
      ? `Loading the model: ${megabytes(loaded)} of ${megabytes(expected)} MB …`
      : "Preparing the model …",
  );
}

function fail(message) {
  $("page").dataset.state = "failed";
  $("loading").hidden = false;
  tell(`This page cannot run here: ${message}`);
  $("progress").hidden = true;
}

function loadModel(name) {
  if (!loadedModels.has(name)) loadedModels.set(name, engine.load(name));
  return loadedModels.get(name);
}

async function isLoaded(name) {
  try {
    await loadModel(name);
    return true;
  } catch {
    return false;
  }
}

async function addGallery() {
  $("gallery-note").textContent = page.gallery_note;
  if (!page.gallery.length) $("saving").textContent = page.gallery_note;
  const all = await Promise.all(
    page.gallery.map(async ({ file, name, label, group }) => {
      const pixels = await pixelsOfFile(await (await fetchFile(file)).blob(), file, page);
      return newPicture({ name, group, label, pixels });
    }),
  );
  for (const picture of all) keep(picture);
}

const newPicture = (about) => ({ label: null, trajectories: {}, ...about });

function keep(picture) {
  pictures.push(picture);
  gallery.add(picture, page.image_size);
}

// What is computed ---------------------------------------------------------------------------------------------------

/** The next picture that lacks a step at the present settings. */
function lacking() {
  const order = chosen ? [chosen, ...pictures] : pictures;
  return order.find((picture) => !picture.trajectories[model]?.end(depth, threshold).done);
}

async function work() {
  if (working || $("page").dataset.state !== "ready") return;
  working = true;
  try {
    for (let picture; (picture = lacking()); ) {
      const name = model;
      if (!(await isLoaded(name))) break; // `changeModel` says so, and goes on with another
      if (name !== model) continue; // another one was chosen meanwhile
      const trajectory = picture.trajectories[name];
      if (!trajectory) {
        const { run, ms } = await engine.begin(name, picture.pixels);
        picture.trajectories[name] = new Trajectory(run, ms);
      } else {
        trajectory.add(await engine.step(trajectory.run));
        if (picture === chosen && !playing) shown = endOf(chosen).used;
      }
      refresh();
      // The browser draws, and answers to the user, between two steps of pictures in the background.
      if (picture !== chosen) await new Promise((resolve) => setTimeout(resolve));
    }
  } catch (error) {
    fail(error.message);
  } finally {
    working = false;
  }
}

function endOf(picture, name = model) {
  const trajectory = picture?.trajectories[name];
  if (!trajectory) return { used: 0, halted: false, done: false };
  const end = trajectory.end(depth, threshold);
  if (!end.used) return end;
  const { top } = trajectory.steps[end.used - 1];
  return { ...end, top, right: picture.label === null ? null : top === picture.label };
}

// What the user does -------------------------------------------------------------------------------------------------

function choose(picture, { play = true } = {}) {
  chosen = picture;
  draw($("picture"), picture.pixels, page.image_size);
  if (play) replay();
  else shown = endOf(picture).used;
  refresh();
  work();
}

/** Shows the steps one after another. */
function replay() {
  stopPlaying();
  if (still.matches) {
    shown = endOf(chosen).used || 1;
    return;
  }
  shown = 1;
  playing = setInterval(() => {
    const end = endOf(chosen);
    if (shown < end.used) shown++;
    else if (end.done) stopPlaying();
    refresh();
  }, STEP_TIME);
}

function stopPlaying() {
  clearInterval(playing);
  playing = null;
}

function changeSetting() {
  stopPlaying();
  shown = endOf(chosen).used || 1;
  showSettings();
  refresh();
  work();
}

async function changeModel(name) {
  const before = model;
  model = name;
  changeSetting(); // what is known of it is shown at once
  $("models").setAttribute("aria-busy", "true");
  try {
    await loadModel(name);
  } catch (error) {
    loadedModels.delete(name); // it may be tried again
    complain(`This model cannot be loaded: ${error.message}`);
    if (model === name) {
      document.querySelector(`input[name=model][value="${before}"]`).checked = true;
      model = before;
    }
  }
  $("models").removeAttribute("aria-busy");
  changeSetting();
}

async function addFiles(files) {
  complain("");
  const problems = [];
  let first = null;
  for (const file of files) {
    if (pictures.filter((p) => p.group === "own").length >= MOST_OWN) {
      problems.push(`${MOST_OWN} pictures are kept at most: reload the page to begin anew`);
      break;
    }
    try {
      const picture = newPicture({ name: file.name, group: "own", pixels: await pixelsOfFile(file, file.name, page) });
      keep(picture);
      first ??= picture;
    } catch (error) {
      problems.push(error.message);
    }
  }
  complain(problems.join(". "));
  if (first) {
    stopCamera();
    choose(first);
  }
}

async function toggleCamera() {
  complain("");
  if (camera.on) {
    const last = chosen;
    stopCamera();
    if (last?.group === "camera") {
      keep(Object.assign(last, { group: "own", name: `Camera, ${new Date().toLocaleTimeString()}` }));
      refresh();
    }
    return;
  }
  try {
    await camera.start();
  } catch (error) {
    return complain(error.message);
  }
  $("camera").setAttribute("aria-pressed", "true");
  $("camera").textContent = "Keep this frame";
  $("answer").classList.add("live");
  for (; camera.on; await new Promise(requestAnimationFrame)) {
    const frame = camera.frame();
    if (!frame || (chosen?.group === "camera" && !endOf(chosen).done)) continue;
    const before = chosen;
    stopPlaying();
    choose(
      newPicture({
        name: "Camera",
        group: "camera",
        pixels: pixelsOf(frame.image, frame.width, frame.height, page),
        trajectories: {},
        before: before?.group === "camera" && endOf(before).done ? before : null,
      }),
      { play: false },
    );
    if (before?.group === "camera") {
      for (const { run } of Object.values(before.trajectories)) engine.forget(run);
      before.before = null;
    }
  }
}

function stopCamera() {
  if (!camera.on) return;
  camera.stop();
  $("camera").setAttribute("aria-pressed", "false");
  $("camera").textContent = "Camera";
  $("answer").classList.remove("live");
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function listen() {
  $("depth").addEventListener("input", () => {
    depth = Number($("depth").value);
    changeSetting();
  });
  $("threshold").addEventListener("input", () => {
    threshold = Number($("threshold").value);
    changeSetting();
  });
  listenToSteps((step) => {
    stopPlaying();
    shown = step;
    refresh();
  });
  $("replay").addEventListener("click", () => {
    if (chosen) replay();
    refresh();
  });
  $("choose").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", async () => {
    await addFiles([...$("files").files]);
    $("files").value = "";
  });
  $("camera").addEventListener("click", toggleCamera);
  let inside = 0;
  const dragged = (change) => (event) => {
    event.preventDefault();
    inside = change === null ? 0 : inside + change;
    $("drop").hidden = inside <= 0;
  };
  addEventListener("dragenter", dragged(1));
  addEventListener("dragleave", dragged(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    dragged(null)(event);
    addFiles([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData?.files.length) addFiles([...event.clipboardData.files]);
  });
}

// What is drawn ------------------------------------------------------------------------------------------------------

function setKnobs() {
  $("depth").max = page.max_steps;
  $("depth").value = depth;
  $("threshold").value = threshold;
  for (const { name, title, bytes } of page.models) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    input.type = "radio";
    input.name = "model";
    input.value = name;
    input.checked = name === model;
    input.addEventListener("change", () => changeModel(name));
    const size = document.createElement("span");
    size.className = "hint";
    size.textContent = ` ${megabytes(bytes)}\u00a0MB`;
    label.append(input, ` ${title}`, size);
    $("models").append(label);
  }
  showSettings();
}

function showSettings() {
  const { trained_depth: trained } = page;
  $("depth-value").textContent = steps(depth);
  $("depth").setAttribute("aria-valuetext", steps(depth));
  $("depth-hint").textContent =
    trained === null
      ? "How deep it was trained is not known."
      : depth > trained
        ? `Deeper than the ${steps(trained)} it was trained to: may answer worse.`
        : `It was trained to ${steps(trained)}.`;
  showOutcomes();
  $("threshold-value").textContent = threshold >= 1 ? "never" : threshold.toFixed(2);
  $("threshold").setAttribute("aria-valuetext", threshold >= 1 ? "never halts" : threshold.toFixed(2));
}

function refresh() {
  // Between two camera frames the answer to the one before stays.
  const subject = chosen?.before && !endOf(chosen).done ? chosen.before : chosen;
  const trajectory = subject?.trajectories[model] ?? null;
  const end = endOf(subject);
  const { classes } = page;
  const live = subject?.group === "camera";
  if (live) shown = end.used;
  shown = Math.max(1, Math.min(shown, end.used || 1));
  const step = trajectory?.steps[shown - 1] ?? null;
  const [other, otherName] = otherStep(subject);

  drawSteps({ trajectory, end, depth, threshold, shown, trained: page.trained_depth, classes });
  drawBars({
    step,
    steps: trajectory?.steps.slice(0, end.used) ?? [],
    other,
    otherName,
    classes,
    label: subject?.label ?? null,
  });
  $("shown-step").textContent = shown;
  gallery.update(chosen, endOf, classes);
  showSaving();
  showAnswer(subject, trajectory, end, step);
}

/** The same step by another model, where it has been taken; and that model's title. */
function otherStep(picture) {
  for (const { name, title } of page.models) {
    const step = name !== model && picture?.trajectories[name]?.steps[shown - 1];
    if (step) return [step, title];
  }
  return [null, ""];
}

function showAnswer(picture, trajectory, end, step) {
  const answer = $("answer");
  answer.dataset.done = Boolean(end.done && !playing);
  $("replay").disabled = !end.done || picture.group === "camera" || end.used < 2;
  $("replay").title = end.done && end.used < 2 ? "It took one step: there is nothing to replay" : "";
  if (!step) {
    $("top").textContent = picture ? "…" : "No picture yet";
    for (const id of ["share", "share-name", "truth", "halting", "times", "compared"]) $(id).textContent = "";
    return;
  }
  const { classes } = page;
  $("picture").setAttribute("aria-label", picture.name);
  $("top").textContent = classes[step.top];
  $("share").textContent = percent(step.probabilities[step.top]);
  $("share-name").textContent = SHARE_NAME;
  const last = end.done && shown === end.used;
  const truth = $("truth");
  truth.className = "truth";
  truth.textContent = "";
  if (picture.label !== null) {
    const right = step.top === picture.label;
    truth.classList.add(right ? "right" : "wrong");
    truth.textContent = right ? "✓ right" : `✗ it is: ${classes[picture.label]}`;
  }
  // Two decimals, or one more where the threshold would look the same.
  const halt = step.halt.toFixed(step.halt.toFixed(2) === threshold.toFixed(2) ? 3 : 2);
  $("halting").textContent = !last
    ? `After step ${shown}: halt_prob ${halt}`
    : end.halted
      ? `Halted after step ${end.used} of at most ${depth}: halt_prob ${halt} exceeds ${threshold.toFixed(2)}.`
      : threshold >= 1
        ? `Took all ${steps(depth)}: it never halts at this setting.`
        : `Took all ${steps(depth)}: halt_prob ${halt} does not exceed ${threshold.toFixed(2)}.`;
  $("times").textContent = last ? times(end) : "";
  $("compared").textContent = last ? compared(picture) : "";
  if (last && !playing && picture.group !== "camera") say(picture);
}

/** What a step takes here, of all that this model has taken: the first ones, while the processor wakes up, take longer. */
function times(end) {
  const taken = pictures.flatMap((picture) => picture.trajectories[model]?.steps ?? []);
  if (!taken.length) return "";
  const each = median(taken.map((step) => step.ms));
  const left = end.halted && depth > end.used ? `, ${(each * (depth - end.used)).toFixed(0)}\u00a0ms saved` : "";
  return `About ${each.toFixed(0)}\u00a0ms a step here${left}`;
}

/** What each model that has been run ends with. */
function compared(picture) {
  const found = page.models
    .map(({ name, title }) => ({ title, end: endOf(picture, name), trajectory: picture.trajectories[name] }))
    .filter(({ end }) => end.done);
  if (found.length < 2) return "";
  return found
    .map(({ title, end, trajectory }) => {
      const step = trajectory.steps[end.used - 1];
      return `${title}: ${page.classes[step.top]} ${percent(step.probabilities[step.top])} after ${steps(end.used)}`;
    })
    .join(" · ");
}

function showSaving() {
  const ends = pictures.filter((p) => p.group !== "own").map((p) => endOf(p));
  const done = ends.filter((end) => end.done);
  if (!ends.length) return;
  if (done.length < ends.length) {
    $("saving").dataset.done = false;
    return;
  }
  const mean = done.reduce((sum, end) => sum + end.used, 0) / done.length;
  const right = done.filter((end) => end.right).length;
  $("saving").dataset.done = true;
  $("saving").innerHTML = "";
  const number = document.createElement("b");
  number.textContent = mean.toFixed(1);
  $("saving").append(
    `The number is the steps a picture took. These ${done.length}: `,
    number,
    ` on average, ${right} right (red: wrong).`,
  );
}

/** What this depth and threshold do with all test images that were tried, as Python counted it. */
function showOutcomes() {
  $("outcomes").hidden = !page.outcomes;
  if (!page.outcomes) return;
  const { images, steps: taken, right } = page.outcomes;
  const at = (rows, place) => Number(rows[depth - 1].split(" ")[place]);
  const place = Math.round(threshold * 100);
  const mean = at(taken, place) / images;
  $("outcome-work").style.transform = `scaleX(${mean / depth})`;
  $("outcome-steps").textContent = `${mean.toFixed(2)} of ${steps(depth)}`;
  const share = (count) => `${((100 * count) / images).toFixed(1)}\u00a0%`;
  $("outcome-right").textContent =
    `a picture on average; ${share(at(right, place))} right` +
    (threshold >= 1 ? "." : `. Never halting: ${share(at(right, 100))}.`);
}

/** Says the answer to screen readers, once. */
function say(picture) {
  const text = `${picture.name}: ${$("top").textContent}, softmax share ${$("share").textContent}. ${$("truth").textContent} ${$("halting").textContent}`;
  if (text !== said) $("said").textContent = said = text;
}

const steps = (count) => `${count} step${count === 1 ? "" : "s"}`;
const percent = (share) => `${(100 * share).toFixed(share > 0.995 && share < 1 ? 1 : 0)}\u00a0%`;
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}

start().catch((error) => fail(error.message));
