// Draws the figures of a report from the numbers in #curves: names toggle lines, a drag zooms, a touch reads off.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 380, LEFT = 58, RIGHT = 14, TOP = 10, BOTTOM = 40;

function element(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

function short(count) {
  for (const [unit, size] of [["B", 1e9], ["M", 1e6], ["k", 1e3]])
    if (Math.abs(count) >= size) return +(count / size).toPrecision(3) + unit;
  return String(Math.round(count));
}

function ticks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(+at.toPrecision(12));
  return found;
}

class Chart {
  constructor(figure, panel, hidden) {
    Object.assign(this, { figure, panel, hidden });
    this.whole = [0, Math.max(...panel.lines.flatMap(line => line.x), ...panel.bars.map(bar => 1.01 * bar.x))];
    this.range = this.whole;
    this.said = figure.querySelector(".said");
    for (const button of figure.querySelectorAll("button[data-from]"))
      button.onclick = () => this.zoom([button.dataset.from * this.whole[1], this.whole[1]]);
  }

  zoom(range) { this.range = range[1] > range[0] ? range : this.whole; this.draw(); }

  shown() { return this.panel.lines.filter(line => !this.hidden.has(line.name)); }

  heights() {
    const [low, high] = this.range, values = [];
    if (low === this.whole[0] && high === this.whole[1]) return this.panel.y;
    for (const line of this.shown())
      line.x.forEach((x, i) => { if (x >= low && x <= high) values.push(line.y[i] - (line.se ? line.se[i] : 0), line.y[i] + (line.se ? line.se[i] : 0)); });
    for (const bar of this.panel.bars)
      if (!this.hidden.has(bar.name) && bar.x <= high) values.push(bar.low, bar.high);
    if (!values.length) return this.panel.y;
    const bottom = Math.min(...values), top = Math.max(...values), room = 0.06 * (top - bottom) || 1e-3;
    return [bottom - room, top + room];
  }

  draw() {
    const place = this.figure.querySelector(".plot"), width = place.clientWidth;
    place.replaceChildren();
    const svg = element(place, "svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": this.panel.title });
    const [x0, x1] = this.range, [y0, y1] = this.heights();
    this.x = value => LEFT + (value - x0) / (x1 - x0) * (width - LEFT - RIGHT);
    this.y = value => HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    this.back = pixel => x0 + (pixel - LEFT) / (width - LEFT - RIGHT) * (x1 - x0);
    for (const at of ticks(y0, y1, 6)) {
      element(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: this.y(at), y2: this.y(at), class: at === 0 ? "zero" : "grid" });
      element(svg, "text", { x: LEFT - 6, y: this.y(at) + 4, "text-anchor": "end" }, String(at));
    }
    for (const at of ticks(x0, x1, width < 500 ? 4 : 7))
      element(svg, "text", { x: this.x(at), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, short(at));
    element(svg, "text", { x: width - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, "training tokens");
    const id = `clip-${this.figure.id}`;
    element(element(svg, "clipPath", { id }), "rect", { x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM });
    const inside = element(svg, "g", { "clip-path": `url(#${id})` });
    for (const line of this.shown()) this.line(inside, line);
    for (const bar of this.panel.bars) if (!this.hidden.has(bar.name))
      element(inside, "line", { x1: this.x(bar.x), x2: this.x(bar.x), y1: this.y(bar.low), y2: this.y(bar.high), class: `bar s${bar.colour}` });
    for (const mark of this.panel.marks) if (!this.hidden.has(mark.name)) {
      const [x, y] = [this.x(mark.x) - 6, this.y(mark.y)];
      element(inside, "path", { d: `M${x},${y - 6}l6,6l-6,6l-6,-6z`, class: `mark s${mark.colour}` });
    }
    this.listen(svg, inside);
  }

  line(parent, line) {
    if (line.se) {
      const up = line.x.map((x, i) => `${this.x(x)},${this.y(line.y[i] + line.se[i])}`);
      const down = line.x.map((x, i) => `${this.x(x)},${this.y(line.y[i] - line.se[i])}`).reverse();
      element(parent, "polygon", { points: [...up, ...down].join(" "), class: `band s${line.colour}` });
    }
    const points = line.x.map((x, i) => `${this.x(x).toFixed(1)},${this.y(line.y[i]).toFixed(1)}`).join(" ");
    element(parent, "polyline", { points, class: `${line.kind} s${line.colour}`, "stroke-dasharray": line.dash });
  }

  listen(svg, inside) {
    const cursor = element(svg, "line", { x1: -9, x2: -9, y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor" });
    let began = null, box = null;
    const at = event => Math.min(Math.max(event.clientX - svg.getBoundingClientRect().left, LEFT), svg.clientWidth - RIGHT);
    svg.onpointerdown = event => {
      began = at(event);
      box = element(inside, "rect", { y: TOP, height: HEIGHT - TOP - BOTTOM, x: began, width: 0, class: "drag" });
    };
    svg.onpointermove = event => {
      const here = at(event);
      this.read(this.back(here), cursor);
      if (began !== null) { box.setAttribute("x", Math.min(began, here)); box.setAttribute("width", Math.abs(here - began)); }
    };
    svg.onpointerup = event => {
      const from = began, to = at(event);
      began = null;
      if (Math.abs(to - from) > 12) this.zoom([this.back(Math.min(from, to)), this.back(Math.max(from, to))]);
      else { box.remove(); this.read(this.back(to), cursor); }
    };
    svg.onpointerleave = () => { if (box) box.remove(); began = null; };
    svg.ondblclick = () => this.zoom(this.whole);
  }

  read(tokens, cursor) {
    const words = [];
    let where = null;
    for (const line of this.shown().filter(line => line.kind === "thick" && line.x.length)) {
      const i = line.x.reduce((best, x, k) => Math.abs(x - tokens) < Math.abs(line.x[best] - tokens) ? k : best, 0);
      where = where === null ? line.x[i] : where;
      words.push(`${line.name} ${line.y[i].toFixed(this.panel.digits)}`);
    }
    if (where === null) return;
    cursor.setAttribute("x1", this.x(where)); cursor.setAttribute("x2", this.x(where));
    this.said.textContent = `${short(where)} tokens: ${words.join(", ")}`;
  }
}

{
  const panels = JSON.parse(document.getElementById("curves").textContent), hidden = new Set();
  const charts = [...document.querySelectorAll("figure.chart")].map((figure, i) => new Chart(figure, panels[i], hidden));
  const draw = () => charts.forEach(chart => chart.draw());
  for (const button of document.querySelectorAll("button[data-name]"))
    button.onclick = () => {
      const name = button.dataset.name, off = !hidden.delete(name);
      if (off) hidden.add(name);
      button.setAttribute("aria-pressed", String(!off));
      draw();
    };
  window.addEventListener("resize", draw);
  draw();
}
