/** The probabilities of the classes after one step, as bars that move; a tick shows those of the other model. */

const ALL = 12; // as many classes are all shown, in their own order
const LEAST = 0.01; // a tick for less says nothing
const SOME = 8; // of more, those that any step found most probable

const list = document.getElementById("bars");
const hint = document.getElementById("bars-hint");
let shownClasses = "";

/** The classes to show for a trajectory's steps. */
export function chosenClasses(steps, count) {
  const every = Array.from({ length: count }, (_, c) => c);
  if (count <= ALL || !steps.length) return every.slice(0, Math.max(SOME, count <= ALL ? count : SOME));
  const most = every.map((c) => Math.max(...steps.map((s) => s.probabilities[c])));
  return every.sort((a, b) => most[b] - most[a]).slice(0, SOME).sort((a, b) => a - b);
}

/** Draws a step's probabilities (none: empty bars); `other` are another model's, `label` is the true class or null. */
export function drawBars({ step, steps, other, otherName, classes, label }) {
  const chosen = chosenClasses(steps, classes.length);
  if (shownClasses !== String(chosen)) {
    shownClasses = String(chosen);
    list.replaceChildren(...chosen.map((c) => row(classes[c], c)));
  }
  for (const item of list.children) {
    const c = Number(item.dataset.label);
    const share = step ? step.probabilities[c] : 0;
    item.dataset.probability = share;
    item.classList.toggle("top", Boolean(step) && c === step.top);
    item.classList.toggle("true", c === label);
    item.querySelector(".fill").style.transform = `scaleX(${share})`;
    item.querySelector(".percent").textContent = step ? shown(share) : "";
    item.querySelector(".mark").textContent = c === label ? " (its class)" : "";
    const tick = item.querySelector(".tick");
    tick.hidden = !other || (other.probabilities[c] < LEAST && share < LEAST);
    if (other) tick.style.left = `${other.probabilities[c] * 100}%`;
  }
  hint.textContent = [
    label !== null ? "✓: the true class." : "",
    classes.length > chosen.length ? `${chosen.length} of ${classes.length} classes.` : "",
    other ? `Tick: ${otherName}, same step.` : "",
  ].join(" ");
}

function row(name, label) {
  const item = document.createElement("li");
  item.dataset.label = label;
  item.innerHTML =
    '<span class="name"><span class="class"></span><span class="mark unseen"></span></span><span class="bar"><span class="fill"></span>' +
    '<span class="tick" hidden></span></span><span class="percent"></span>';
  const text = item.querySelector(".class");
  text.textContent = text.title = name;
  return item;
}

const shown = (share) => (share < 0.0005 ? "0\u00a0%" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}\u00a0%`);
