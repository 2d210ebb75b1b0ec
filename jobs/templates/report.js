"use strict";
// Everything that comes from the run is put into the page as text or as an attribute, never as markup.
const run = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  const made = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const SVG_TAGS = new Set(["svg", "path", "line", "circle", "rect", "text", "g", "title"]);

// --- plots -----------------------------------------------------------------------------------------------------------

const W = 400, H = 200, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 22;

function written(value, unit) {
  if (unit === "%") return (100 * value).toFixed(Math.abs(value) < 0.1 ? 1 : 0) + " %";
  const size = Math.abs(value);
  const number = size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(1) : String(+value.toPrecision(3));
  return unit ? `${number} ${unit}` : number;
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((one) => one * power >= rough) || 10);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
  return ticks;
}

function running(points) {  // centred mean over about a twentieth of the curve
  const half = Math.max(1, Math.round(points.length / 40));
  return points.map(([x], at) => {
    const near = points.slice(Math.max(0, at - half), at + half + 1);
    return [x, near.reduce((sum, one) => sum + one[1], 0) / near.length];
  });
}

function drawPlot(plot) {
  const hidden = new Set();
  const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "img", "aria-label": `${plot.title}. ${plot.about}` });
  const legend = el("div", { class: "legend" });
  const caption = el("figcaption", {}, plot.title, el("small", {}, plot.about));
  const figure = el("figure", { class: "plot" }, caption, svg, legend);
  const outputs = plot.curves.map((curve, at) => {
    const output = el("output"), swatch = el("i"), button = el("button", { type: "button", "aria-pressed": "true" }, swatch, curve.name, output);
    swatch.style.background = `var(--c${at % 5})`;
    button.addEventListener("click", () => {
      if (!hidden.delete(at)) hidden.add(at);
      button.setAttribute("aria-pressed", String(!hidden.has(at)));
      draw();
    });
    legend.append(button);
    return output;
  });
  let toX, steps, cross;

  function draw() {
    svg.replaceChildren();
    const curves = plot.curves.map((curve, at) => ({ ...curve, at })).filter((curve) => !hidden.has(curve.at));
    const usable = (y) => !plot.log || y > 0;
    const ys = curves.flatMap((curve) => curve.points.map((point) => point[1])).filter(usable);
    const xs = plot.curves.flatMap((curve) => curve.points.map((point) => point[0]));
    const [first, last] = [Math.min(...xs), Math.max(...xs)];
    steps = [...new Set(xs)].sort((a, b) => a - b);
    const scale = plot.log ? Math.log10 : (y) => y;
    let low = ys.length ? Math.min(...ys.map(scale)) : 0, high = ys.length ? Math.max(...ys.map(scale)) : 1;
    if (!plot.log && low > 0 && low < high / 2) low = 0;
    if (plot.log) [low, high] = [Math.floor(low), Math.ceil(high)];
    if (high === low) [low, high] = [low - 0.5, high + 0.5];
    toX = (x) => LEFT + (W - LEFT - RIGHT) * (last === first ? 0.5 : (x - first) / (last - first));
    const toY = (y) => H - BOTTOM - (H - TOP - BOTTOM) * ((scale(y) - low) / (high - low));
    const ticks = plot.log ? Array.from({ length: high - low + 1 }, (_, n) => 10 ** (low + n)) : niceTicks(low, high, 4);
    for (const tick of ticks) {
      svg.append(el("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: toY(tick), y2: toY(tick) }));
      svg.append(el("text", { x: LEFT - 4, y: toY(tick) + 4, "text-anchor": "end" }, plot.log ? tick.toExponential(0) : written(tick, plot.unit === "%" ? "%" : "")));
    }
    for (const tick of last === first ? [first] : niceTicks(first, last, 5)) {
      svg.append(el("text", { x: toX(tick), y: H - 6, "text-anchor": "middle" }, String(tick)));
    }
    const path = (points) => points.filter((p) => usable(p[1])).map((p, at) => `${at ? "L" : "M"}${toX(p[0]).toFixed(1)} ${toY(p[1]).toFixed(1)}`).join("");
    for (const curve of curves) {
      const stroke = `var(--c${curve.at % 5})`;
      const add = (kind, points) => { const line = el("path", { class: kind, d: path(points) }); line.style.stroke = stroke; svg.append(line); };
      if (curve.dots || curve.points.length < 20) {
        add("mean", curve.points);
        for (const point of curve.points.filter((p) => usable(p[1]))) {
          const dot = el("circle", { cx: toX(point[0]), cy: toY(point[1]), r: 3.5 });
          dot.style.fill = stroke;
          svg.append(dot);
        }
      } else {
        add("raw", curve.points);
        add("mean", running(curve.points));
      }
    }
    cross = el("line", { class: "cross", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
    svg.append(cross);
  }

  let at = -1;
  function show(place) {  // the values at one step, in the legend
    at = Math.max(0, Math.min(steps.length - 1, place));
    const step = steps[at];
    cross.setAttribute("x1", toX(step));
    cross.setAttribute("x2", toX(step));
    cross.setAttribute("visibility", "visible");
    plot.curves.forEach((curve, number) => {
      let best = null;
      for (const point of curve.points) if (point[0] <= step) best = point;
      outputs[number].textContent = best ? written(best[1], plot.unit) : "–";
    });
    caption.firstChild.textContent = `${plot.title}, step ${+step.toFixed(1)}`;
  }
  function leave() {
    at = -1;
    cross.setAttribute("visibility", "hidden");
    outputs.forEach((output) => { output.textContent = ""; });
    caption.firstChild.textContent = plot.title;
  }
  function point(event) {
    const edge = svg.getBoundingClientRect(), x = ((event.clientX - edge.left) / edge.width) * W;
    let best = 0;
    steps.forEach((step, place) => { if (Math.abs(toX(step) - x) < Math.abs(toX(steps[best]) - x)) best = place; });
    show(best);
  }
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const far = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: at < 0 ? steps.length - 1 : at - far, ArrowRight: at + far, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
  draw();
  return figure;
}

byId("plots").append(...run.plots.map(drawPlot));

// --- groups ----------------------------------------------------------------------------------------------------------

const known = (values) => values.filter((value) => value !== null);
/** The advantage of an attempt: its only one, or the mean of its turns'. null: not written, or it left the loss. */
function advantage(attempt) {
  const values = known(attempt.advantages);
  return values.length ? values.reduce((sum, one) => sum + one, 0) / values.length : null;
}
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);
const kind = (attempt) => { const a = advantage(attempt); return a === null || a === 0 ? "none" : a > 0 ? "gain" : "loss"; };
const groupId = (group) => `step-${group.step}`;

function scene(group) {
  const image = el("img", { src: group.view, alt: `Coarse view of “${group.question}”` });
  const figure = el("figure", { class: "scene" }, image);
  if (!group.size) {
    figure.append(el("figcaption", {}, "The boxes are in the picture: an older run, which did not write the image's size."));
    return figure;
  }
  const [width, height] = group.size;
  const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const rect = (box, name) => el("rect", { class: name, x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] });
  for (const target of group.targets) svg.append(rect(target, "under"), rect(target, "target"));
  for (const attempt of group.attempts) {
    if (attempt.crop) svg.append(el("g", { class: "box", "data-sample": attempt.sample }, rect(attempt.crop, "under"), rect(attempt.crop, kind(attempt))));
  }
  const frame = el("div", { class: "scene" }, image, svg);
  figure.replaceChildren(frame, el("figcaption", {}, "Boxes: green above the group's mean, red dashed below, white equal or unknown" + (group.targets.length ? "; yellow dots: the target." : ".")));
  return figure;
}

function card(attempt, group, tag) {
  const value = advantage(attempt);
  const top = el("div", {});
  if (attempt.picture) top.append(el("img", { src: attempt.picture, alt: `Crop of attempt ${attempt.sample}` }));
  top.append(el("b", {}, attempt.total === null ? "unscored" : `reward ${+attempt.total.toFixed(3)}`));
  const turns = attempt.advantages.length > 1 ? ` (${attempt.advantages.map((one) => (one === null ? "–" : signed(one))).join(", ")} by turn)` : "";
  const about = [tag === "a" ? `step ${group.step}, #${attempt.sample}` : `#${attempt.sample}`, attempt.outcome];
  if (attempt.box_outcome !== "ok") about.push(`box: ${attempt.box_outcome}`);
  if (attempt.area_ratio !== null) about.push(`${written(attempt.area_ratio, "%")} of the image`);
  top.append(el("p", { class: "about" }, value === null ? "advantage –" : `advantage ${signed(value)}${turns}`));
  top.append(el("p", { class: "about" }, about.join(" · ")));
  const parts = el("ul", { class: "parts" });
  for (const [name, part] of Object.entries(attempt.parts)) parts.append(el("li", { class: part === 1 ? "full" : part === 0 ? "zero" : "" }, `${name} ${+part.toFixed(2)}`));
  const made = el(tag, { class: `attempt ${kind(attempt)}` }, top);
  if (tag === "a") made.append(el("p", { class: "about" }, group.question));
  for (const reply of attempt.replies) made.append(el("p", {}, reply));
  if (attempt.unscored) made.append(el("p", {}, attempt.unscored));
  made.append(parts);
  return made;
}

function drawGroup(group, matching) {
  const attempts = el("div", { class: "attempts" }), picture = scene(group);
  for (const attempt of group.attempts) {
    const made = card(attempt, group, "article");
    made.tabIndex = 0;
    made.classList.toggle("out", !matching.has(attempt));
    const light = (on) => picture.querySelectorAll(".box").forEach((box) => {
      const mine = box.dataset.sample === String(attempt.sample);
      box.classList.toggle("lit", on && mine);
      box.classList.toggle("dim", on && !mine);
    });
    for (const event of ["pointerenter", "focus"]) made.addEventListener(event, () => light(true));
    for (const event of ["pointerleave", "blur"]) made.addEventListener(event, () => light(false));
    attempts.append(made);
  }
  const title = el("h3", {}, el("span", {}, `step ${group.step} · `), group.question, el("span", {}, ` · answer: ${group.answer}`));
  const section = el("section", { class: "group", id: groupId(group), tabindex: -1 }, title);
  if (group.options.length) section.append(el("p", { class: "hint" }, group.options.map((one, at) => `${String.fromCharCode(65 + at)}. ${one}`).join("   ")));
  section.append(el("div", { class: "body" }, picture, attempts));
  return section;
}

// --- filters ---------------------------------------------------------------------------------------------------------

const form = byId("filters"), PAGE = 12;
const outcomes = new Set(run.groups.flatMap((group) => group.attempts.map((attempt) => attempt.outcome)));
for (const outcome of [...outcomes].sort()) form.elements.outcome.append(el("option", { value: outcome }, outcome));
for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (form.elements[name]) form.elements[name].value = value;
let chosen = [], shown = 0;

function bound(name, otherwise) {
  const text = form.elements[name].value;
  return text === "" ? otherwise : Number(text);
}

function spread(group) {
  const values = known(group.attempts.map(advantage));
  return values.length ? Math.max(...values) - Math.min(...values) : 0;
}

function choose() {
  const from = bound("from", -Infinity), to = bound("to", Infinity), low = bound("low", -Infinity), high = bound("high", Infinity);
  const rewarded = low !== -Infinity || high !== Infinity;
  const outcome = form.elements.outcome.value, words = form.elements.words.value.toLowerCase(), order = form.elements.order.value;
  const fits = (attempt, group) =>
    (!outcome || attempt.outcome === outcome) &&
    (!rewarded || (attempt.total !== null && attempt.total >= low && attempt.total <= high)) &&
    (!words || [group.question, group.answer, ...attempt.replies].join("\n").toLowerCase().includes(words));
  chosen = run.groups
    .filter((group) => group.step >= from && group.step <= to)
    .map((group) => ({ group, matching: new Set(group.attempts.filter((attempt) => fits(attempt, group))) }))
    .filter((one) => one.matching.size > 0);
  if (order === "late") chosen.reverse();
  if (order === "spread") chosen.sort((a, b) => spread(b.group) - spread(a.group));
  const attempts = chosen.reduce((sum, one) => sum + one.matching.size, 0);
  byId("count").textContent = `${chosen.length} groups with ${attempts} fitting attempts` + (chosen.length ? "" : ": nothing fits these filters");
  byId("groups").replaceChildren();
  shown = 0;
  more();
}

function more() {
  const next = chosen.slice(shown, shown + PAGE);
  byId("groups").append(...next.map((one) => drawGroup(one.group, one.matching)));
  shown += next.length;
  byId("more").hidden = shown >= chosen.length;
  return next.length > 0;
}

function remember() {  // in the address, so that a page that is renewed keeps its filters
  const kept = [...new FormData(form)].filter(([name, value]) => value !== "" && !(name === "order" && value === "step"));
  history.replaceState(null, "", "#" + new URLSearchParams(kept));
}

function clear() {
  form.reset();
  choose();
  remember();
}

function go(group) {
  let place = chosen.findIndex((one) => one.group === group);
  if (place < 0) {
    clear();
    place = chosen.findIndex((one) => one.group === group);
  }
  while (place >= shown && more());
  const section = byId(groupId(group));
  section.scrollIntoView();
  section.focus({ preventScroll: true });
}

form.addEventListener("input", () => { choose(); remember(); });
byId("all").addEventListener("click", clear);
form.addEventListener("submit", (event) => event.preventDefault());
byId("more").addEventListener("click", more);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  const step = { j: 1, k: -1 }[event.key];
  if (!step || !chosen.length) return;
  const here = event.target.closest(".group"), place = here ? chosen.findIndex((one) => groupId(one.group) === here.id) : -1;
  go(chosen[Math.max(0, Math.min(chosen.length - 1, here ? place + step : 0))].group);
});
choose();

// --- winners and losers ----------------------------------------------------------------------------------------------

const everyone = run.groups.flatMap((group) => group.attempts.map((attempt) => ({ group, attempt })));
const byAdvantage = everyone.some((one) => advantage(one.attempt) !== null);
const worth = (one) => (byAdvantage ? advantage(one.attempt) : one.attempt.total);
const ranked = everyone.filter((one) => worth(one) !== null && (!byAdvantage || worth(one) !== 0)).sort((a, b) => worth(b) - worth(a));
document.querySelector("#extremes .hint").textContent = byAdvantage
  ? "By advantage: how far above or below the rest of its group."
  : "By reward: this run did not write advantages.";
function strip(id, found) {
  byId(id).append(...found.map((one) => {
    const link = card(one.attempt, one.group, "a");
    link.href = `#${groupId(one.group)}`;
    link.addEventListener("click", (event) => { event.preventDefault(); go(one.group); });
    return link;
  }));
}
const MOST = Math.min(5, Math.ceil(ranked.length / 2));
strip("winners", ranked.slice(0, MOST));
strip("losers", ranked.slice(ranked.length - MOST).reverse().filter((one) => !ranked.slice(0, MOST).includes(one)));
if (!ranked.length) byId("extremes").hidden = true;

// --- renewal ---------------------------------------------------------------------------------------------------------

if (run.renew_s) {
  byId("reload").hidden = false;
  setInterval(() => { if (byId("reload").querySelector("input").checked) location.reload(); }, run.renew_s * 1000);
}
