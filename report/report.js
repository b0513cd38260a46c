"use strict";
// Everything shown is set as text, never as markup: tokens come from models.
function element(name, words, kind) {
  const made = document.createElement(name);
  if (words !== undefined) made.textContent = words;
  if (kind) made.className = kind;
  return made;
}

function place(box, rect) {
  box.hidden = false;
  const gap = 8, size = box.getBoundingClientRect();
  const below = rect.bottom + gap + size.height <= innerHeight;
  box.style.left = Math.max(gap, Math.min(rect.left, innerWidth - size.width - gap)) + "px";
  box.style.top = Math.max(gap, below ? rect.bottom + gap : rect.top - size.height - gap) + "px";
}

// ---- tokens: a list on hover and on focus; Tab reaches a response, arrow keys its tokens, Escape closes.
const tip = document.getElementById("tip");

function visible(words) {
  return words.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, (s) => "␣".repeat(s.length));
}

function describe(token, top) {
  tip.replaceChildren();
  const own = visible(token.textContent.replace(/↵\n/g, "\n"));
  const head = element("p");
  head.append(element("b", own), " advantage " + token.dataset.a);
  tip.append(head);
  if (!top.length) return;
  const table = element("table"), names = element("tr");
  for (const name of ["teacher’s top", "advantage", "probability"]) names.append(element("th", name));
  table.append(names);
  for (const [words, advantage, probability] of top) {
    const row = element("tr", undefined, visible(words) === own ? "own" : "");
    row.append(element("td", visible(words)), element("td", (advantage < 0 ? "−" : "+") + Math.abs(advantage).toFixed(2)));
    row.append(element("td", probability < 0.0005 ? "<0.001" : probability.toFixed(3)));
    table.append(row);
  }
  tip.append(table);
}

function hideTip() {
  if (!tip) return;
  tip.hidden = true;
  for (const token of document.querySelectorAll("[aria-describedby=tip]")) token.removeAttribute("aria-describedby");
}

for (const block of document.querySelectorAll(".advantages")) {
  const tops = JSON.parse(block.querySelector("script").textContent);
  const tokens = [...block.querySelectorAll(".tok")];
  const show = (i) => {
    hideTip();
    describe(tokens[i], tops[i]);
    tokens[i].setAttribute("aria-describedby", "tip");
    place(tip, tokens[i].getBoundingClientRect());
  };
  tokens.forEach((token, i) => {
    token.tabIndex = i ? -1 : 0; // one stop a response; the arrow keys do the rest
    token.addEventListener("mouseenter", () => show(i));
    token.addEventListener("mouseleave", hideTip);
    token.addEventListener("focus", () => show(i));
    token.addEventListener("blur", hideTip);
    token.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hideTip();
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (to === undefined || !tokens[to]) return;
      event.preventDefault();
      token.tabIndex = -1;
      tokens[to].tabIndex = 0;
      tokens[to].focus();
    });
  });
}
addEventListener("scroll", hideTip, { passive: true });

const values = document.getElementById("values");
if (values) values.addEventListener("change", () => document.body.classList.toggle("values", values.checked));

// ---- charts: the values at the nearest step under the pointer.
const read = element("div");
read.id = "read";
read.hidden = true;
document.body.append(read);
for (const chart of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(chart.dataset.lines);
  const cross = document.createElementNS(chart.namespaceURI, "line");
  cross.setAttribute("class", "cross");
  cross.setAttribute("visibility", "hidden");
  chart.append(cross);
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect(), scale = box.width / chart.viewBox.baseVal.width;
    const at = (event.clientX - box.left) / scale;
    const near = lines.map((line) => line[2].reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)));
    const closest = near.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    for (const [key, value] of [["x1", closest[0]], ["x2", closest[0]], ["y1", 10], ["y2", 144]]) cross.setAttribute(key, value);
    cross.setAttribute("visibility", "visible");
    read.replaceChildren(element("b", "step " + closest[2]));
    lines.forEach(([split, seed], i) => {
      if (near[i][2] !== closest[2]) return;
      read.append(element("div", [seed, split === "eval" ? "held out" : "train", near[i][3]].filter((s) => s !== "").join(" ")));
    });
    place(read, { left: event.clientX + 12, bottom: event.clientY + 4, top: event.clientY - 4 });
  });
  chart.addEventListener("pointerleave", () => { read.hidden = true; cross.setAttribute("visibility", "hidden"); });
}
