/** Thumbnails by group: easy and hard test images, and the user's own. */

import { draw } from "./pictures.js";

const TITLES = { easy: "Easy", hard: "Hard", own: "Yours" };

export class Gallery {
  #groups = new Map(); // name → its list
  #buttons = new Map(); // picture → button
  #place = document.getElementById("groups");
  #onPick;

  constructor(onPick) {
    this.#onPick = onPick;
  }

  /** Adds a picture's thumbnail to its group. */
  add(picture, size) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "thumb";
    button.append(document.createElement("canvas"), document.createElement("span"));
    draw(button.firstElementChild, picture.pixels, size);
    button.addEventListener("click", () => this.#onPick(picture));
    this.#buttons.set(picture, button);
    const item = document.createElement("li");
    item.append(button);
    this.#list(picture.group).append(item);
  }

  /** Shows which picture is chosen, and how each one ends: `endOf(picture)` gives {used, halted, done, right} or null. */
  update(chosen, endOf, classes) {
    for (const [picture, button] of this.#buttons) {
      const end = endOf(picture);
      const badge = button.lastElementChild;
      const known = end?.done;
      badge.textContent = known ? end.used : "";
      badge.className = !known || end.right === null ? "" : end.right ? "right" : "wrong";
      button.setAttribute("aria-pressed", picture === chosen);
      const answer = known
        ? `, ${classes[end.top]}${end.right === null ? "" : end.right ? ", right" : ", wrong"} after ${end.used} step${end.used > 1 ? "s" : ""}`
        : "";
      button.setAttribute("aria-label", picture.name + answer);
      button.title = picture.name + answer;
    }
  }

  #list(group) {
    if (!this.#groups.has(group)) {
      const box = document.createElement("div");
      box.className = "group";
      const title = document.createElement("h3");
      title.textContent = TITLES[group];
      title.id = `group-${group}`;
      const list = document.createElement("ul");
      list.setAttribute("aria-labelledby", title.id);
      box.append(title, list);
      if (group === "own") this.#place.prepend(box);
      else this.#place.append(box);
      this.#groups.set(group, list);
    }
    return this.#groups.get(group);
  }
}
