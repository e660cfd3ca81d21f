/** The steps of a picture: a column each, as high as halt_prob, the threshold as a line across, and the answers below. */

const columns = document.getElementById("columns");
const line = document.getElementById("line");
const lineLabel = document.getElementById("line-label");
const spans = document.getElementById("spans");

/** onChoose(step): told of the step that the user chooses, from 1 on. */
export function listenToSteps(onChoose) {
  columns.addEventListener("change", (event) => onChoose(Number(event.target.value)));
}

/** Makes as many columns as there may be steps. */
function setCount(count) {
  while (columns.children.length - 1 > count) columns.lastElementChild.remove();
  for (let step = columns.children.length; step <= count; step++) {
    const label = document.createElement("label");
    label.className = "step";
    label.innerHTML =
      '<input type="radio" name="step" class="unseen"><span class="rail"><span class="fill"></span><span class="value"></span></span>' +
      '<span class="number"></span>';
    label.firstElementChild.value = step;
    label.querySelector(".number").textContent = step;
    columns.append(label);
  }
  columns.parentElement.style.setProperty("--steps", count);
  spans.style.setProperty("--steps", count);
}

/** Draws a trajectory (or null) up to the step `shown`; `end` is where it ends, of at most `depth` steps. */
export function drawSteps({ trajectory, end, depth, threshold, shown, trained, classes }) {
  setCount(depth);
  const many = depth > 10;
  columns.classList.toggle("many", many);
  for (let step = 1; step <= depth; step++) {
    const label = columns.children[step];
    const [input, rail] = label.children;
    const taken = trajectory && step <= end.used && step <= trajectory.steps.length;
    const visible = taken && step <= shown;
    const { halt, top, probabilities } = taken ? trajectory.steps[step - 1] : {};
    input.disabled = !taken;
    input.checked = taken && step === shown;
    label.dataset.state = !taken ? (end.done ? "saved" : "waiting") : visible ? "taken" : "hidden";
    label.classList.toggle("halted", Boolean(visible && end.halted && step === end.used));
    label.classList.toggle("deeper", trained !== null && step > trained);
    if (taken) label.dataset.haltProb = halt;
    else delete label.dataset.haltProb;
    rail.firstElementChild.style.transform = `scaleY(${visible ? halt : 0})`;
    rail.lastElementChild.textContent = visible && !many ? halt.toFixed(2) : "";
    rail.lastElementChild.classList.toggle("above", visible && halt < 0.15);
    // Where the line would go through the number, the number goes below it.
    const crossed = visible && threshold < 1 && halt >= threshold && halt < threshold + 0.1;
    rail.style.setProperty("--level", visible ? (crossed ? threshold - 0.01 : halt) : 0);
    input.setAttribute(
      "aria-label",
      taken
        ? `Step ${step}: ${classes[top]} ${percent(probabilities[top])}, halt_prob ${halt.toFixed(2)}${end.halted && step === end.used ? ", halted" : ""}`
        : `Step ${step}: not taken`,
    );
  }
  line.hidden = lineLabel.hidden = threshold >= 1;
  line.style.setProperty("--threshold", threshold);
  lineLabel.textContent = `halts above ${threshold.toFixed(2)}`;
  drawSpans(trajectory, Math.min(end.used, shown), end, depth, classes);
}

/** Answers below the columns, one label for as many steps as gave the same; and what was saved. */
function drawSpans(trajectory, visible, end, depth, classes) {
  const parts = [];
  for (let i = 0; i < visible; i++) {
    const { top } = trajectory.steps[i];
    if (parts.length && parts.at(-1).top === top) parts.at(-1).count++;
    else parts.push({ top, count: 1, text: classes[top] });
  }
  if (end.halted && visible === end.used && depth > end.used) {
    const saved = depth - end.used;
    parts.push({ count: saved, text: saved > 2 ? `${saved} steps saved` : saved > 1 ? "2 saved" : "saved", kind: "saved" });
  }
  spans.replaceChildren(
    ...parts.map(({ count, text, kind }) => {
      const span = document.createElement("span");
      span.style.gridColumn = `span ${count}`;
      span.className = kind ?? "";
      span.textContent = span.title = text;
      return span;
    }),
  );
}

const percent = (share) => `${(100 * share).toFixed(share > 0.995 && share < 1 ? 1 : 0)}\u00a0%`;
