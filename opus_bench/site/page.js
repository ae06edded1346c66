"use strict";
// The page is complete without this file: it filters, shows values of figures and opens run records.
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);

function make(tag, content, attributes = {}) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...[content].flat());  // strings become text, never markup
  return element;
}

// Filters ----------------------------------------------------------------------------------------
const form = byId("filters");
const KEYS = ["table", "scale", "optimizer", "method", "arm"];
const chosen = () => Object.fromEntries(KEYS.map((key) => [key, form.elements[key].value]));
const factsOf = (run) => {
  const record = data.records[run];
  const label = record.arm === null || record.method.toLowerCase().includes(record.arm) ? record.method : `${record.method} (${record.arm})`;
  return { scale: record.scale, optimizer: record.config.optimizer, method: label, arm: record.arm };
};

/** Whether an element's own facts contradict the filters: what it does not say, it does not contradict. */
function contradicts(element, filters, keys) {
  return keys.some((key) => filters[key] && element.dataset[key] !== undefined && element.dataset[key] !== filters[key]);
}

function filterTable(table, filters) {
  const off = all("thead th", table).map((cell) => contradicts(cell, filters, ["method", "arm"]));
  const named = all("tbody tr", table).some((row) => row.dataset.method !== undefined || row.dataset.arm !== undefined);
  for (const row of all("tr", table)) {
    [...row.cells].forEach((cell, at) => cell.classList.toggle("off", off[at]));
    if (row.parentElement.tagName !== "TBODY") continue;
    const other = filters.arm && named && row.dataset.method !== undefined && row.dataset.arm !== filters.arm;
    row.classList.toggle("off", Boolean(other) || contradicts(row, filters, ["scale", "optimizer", "method", "arm"]));
  }
}

function applyFilters() {
  const filters = chosen();
  let shown = 0;
  const articles = all("article[data-page]");
  for (const article of articles) {
    const runs = article.dataset.madeFrom.split(" ").filter(Boolean).map(factsOf);
    // rows of a page may name a method or arm that its runs do not: validation experiments score with selectors
    const named = (key) => all(`[data-${key}]`, article).some((element) => element.dataset[key] === filters[key]);
    const fits = ["scale", "optimizer", "method", "arm"].every((key) =>
      !filters[key] || runs.some((run) => run[key] === filters[key]) || (["method", "arm"].includes(key) && named(key)));
    const on = (!filters.table || filters.table === article.dataset.page) && fits;
    article.classList.toggle("off", !on);
    shown += on;
  }
  for (const part of all("[data-scale], [data-optimizer]")) {
    if (part.tagName !== "TR") part.classList.toggle("off", contradicts(part, filters, ["scale", "optimizer"]));
  }
  all("main table").forEach((table) => filterTable(table, filters));
  for (const key of KEYS) form.elements[key].classList.toggle("on", Boolean(filters[key]));
  byId("count").textContent = `${shown} of ${articles.length} tables`;
  byId("nothing").hidden = shown > 0;
}

function remember() {
  const on = Object.entries(chosen()).filter(([, value]) => value);
  const target = location.hash.split("?")[0];
  const hash = on.length ? `${target || "#top"}?${new URLSearchParams(on)}` : target;
  if (hash !== location.hash) history.replaceState(null, "", hash || location.pathname + location.search);
}

function show(filters) {
  for (const key of KEYS) form.elements[key].value = filters.get(key) ?? "";
  applyFilters();
}

form.hidden = false;
form.addEventListener("change", () => { applyFilters(); remember(); });
form.addEventListener("submit", (event) => event.preventDefault());
const showAll = () => { show(new URLSearchParams()); remember(); };
byId("reset").addEventListener("click", showAll);
byId("show-all").addEventListener("click", showAll);

// Run records ------------------------------------------------------------------------------------
const dialog = byId("dialog");

function facts(block) {
  const rows = Object.entries(block ?? {}).map(([key, value]) => make("tr", [
    make("th", key, { scope: "row" }),
    make("td", typeof value === "string" ? value : JSON.stringify(value)),
  ]));
  return make("table", make("tbody", rows), { class: "plain" });
}

function copyable(text, what) {
  const button = make("button", "Copy", { type: "button", "aria-label": `Copy ${what}` });
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {  // no right to the clipboard: select it, so that the keyboard can copy
      getSelection().selectAllChildren(button.previousSibling);
      button.textContent = "Selected";
    }
  });
  return make("div", [make("pre", text, { tabindex: "0" }), button], { class: "copy" });
}

function card(run, open) {
  const record = data.records[run], { left_out: leftOut, ...kept } = record, text = JSON.stringify(kept, null, 2);
  const of = factsOf(run);
  const evals = record.evals.map((row) => make("tr", [
    make("th", row.task, { scope: "row" }),
    make("td", row.value === null || row.value === undefined ? row.status : `${Number(row.value.toPrecision(5))} (${row.metric})`),
  ]));
  const notes = Object.entries(leftOut).filter(([, n]) => n).map(([name, n]) => `${name} (${n} long)`).join(" and ");
  const save = make("a", "Download what is shown here", { href: "#", download: `${run}.json` });
  save.addEventListener("click", () => {
    save.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    setTimeout(() => { URL.revokeObjectURL(save.href); });
  });
  const part = (title, content) => [make("h4", title), content];
  const body = make("div", [
    ...part("Replay", copyable(data.replay[run], `the command that replays ${run}`)),
    ...part("Config", facts(record.config)),
    ...part("Data hashes", facts(record.data)),
    ...part("Code version", facts(record.code)),
    ...part("Environment", facts(record.environment)),
    ...part("Time and memory", facts(record.timing)),
    ...(evals.length ? part("Evaluation", make("table", make("tbody", evals), { class: "plain" })) : []),
    ...part("Deviations from the paper", make("ul", record.deviations.map((line) => make("li", line)))),
    make("p", [
      make("a", "The whole record", { href: `runs/${run}.json` }), notes ? `, with ${notes}, is the file runs/${run}.json. ` : ". ",
      save, ".",
    ], { class: "note" }),
    make("details", [make("summary", "JSON"), make("pre", text, { tabindex: "0" })]),
  ]);
  const title = `${of.method === record.method && record.arm === null ? record.method : of.method}, ${of.optimizer}, seed ${record.config.seed}`;
  const summary = make("summary", [`${title} `, make("code", `${run} · ${of.scale} · ${record.experiment}`)]);
  return make("details", [summary, body], { class: "run-card", "data-run": run, ...(open ? { open: "" } : {}) });
}

function openRuns(title, runs) {
  byId("dialog-title").textContent = title;
  byId("dialog-note").textContent = `${runs.length} run record${runs.length === 1 ? "" : "s"} behind it.`;
  byId("dialog-runs").replaceChildren(...runs.map((run) => card(run, runs.length === 1)));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  byId("dialog-title").focus();
}

byId("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

const setOf = (cell) => cell.dataset.runs ?? cell.parentElement.dataset.runs ?? "";
function openCell(cell) {
  if (setOf(cell) === "") return;
  const row = cell.parentElement, table = cell.closest("table");
  const column = table.tHead.rows[0].cells[cell.cellIndex].textContent, first = row.cells[0].textContent;
  openRuns(cell.cellIndex ? `${first}: ${column}: ${cell.textContent}` : first, data.sets[Number(setOf(cell))]);
}

// One tab stop a table, arrow keys between its cells, as in the grid pattern.
function makeGrid(table) {
  const cells = all("tbody td, tbody th", table);
  if (!cells.some((cell) => setOf(cell) !== "")) return;
  table.setAttribute("role", "grid");
  cells.forEach((cell) => {
    cell.tabIndex = -1;
    cell.classList.toggle("opens", setOf(cell) !== "");
  });
  (cells.find((cell) => setOf(cell) !== "") ?? cells[0]).tabIndex = 0;
  const stop = (cell) => {
    for (const other of cells) if (other.tabIndex === 0) other.tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus();
  };
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("tbody td, tbody th");
    if (!cell || event.target !== cell) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); openCell(cell); return; }
    const rows = all("tbody tr:not(.off)", table), row = rows.indexOf(cell.parentElement);
    const line = [...cell.parentElement.cells].filter((other) => !other.classList.contains("off")), at = line.indexOf(cell);
    const next = { ArrowRight: line[at + 1], ArrowLeft: line[at - 1], Home: line[0], End: line.at(-1),
      ArrowDown: rows[row + 1]?.cells[cell.cellIndex], ArrowUp: rows[row - 1]?.cells[cell.cellIndex] }[event.key];
    if (next) { event.preventDefault(); stop(next); }
  });
  table.addEventListener("click", (event) => {
    const cell = event.target.closest("tbody td, tbody th");
    if (cell && !event.target.closest("a") && getSelection().isCollapsed) openCell(cell);
  });
}
all("main table:not(.plain)").forEach(makeGrid);

// Figures ----------------------------------------------------------------------------------------
const tip = byId("tip");
const shown = (value) => typeof value === "number" ? value.toLocaleString("en", { maximumSignificantDigits: 5 }) : value;

function makeFigure(figure) {
  const svg = figure.querySelector("svg"), panels = data.figures[figure.dataset.figure];
  const points = panels.flatMap((panel) => panel.series.flatMap((series) =>
    series.points.map(([across, down, x, y]) => ({ across, down, x, y, label: series.label, panel }))));
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  ring.setAttribute("class", "ring");
  ring.setAttribute("r", "5");
  let current = -1;
  const hide = () => { tip.hidden = true; ring.remove(); };
  const point = (at) => {
    current = at;
    const { across, down, x, y, label, panel } = points[at];
    ring.setAttribute("cx", across);
    ring.setAttribute("cy", down);
    svg.append(ring);
    const line = (name, value) => make("span", `${name ? `${name}: ` : ""}${shown(value)}`);
    tip.replaceChildren(make("b", [label, panel.title].filter(Boolean).join(" · ") || figure.dataset.figure), line(panel.x, x), line(panel.y, y));
    tip.hidden = false;
    const place = new DOMPoint(across, down).matrixTransform(svg.getScreenCTM());
    const left = Math.min(Math.max(8, place.x + 14), innerWidth - tip.offsetWidth - 8);
    const above = place.y - tip.offsetHeight - 12;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : place.y + 16}px`;
  };
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = -1, nearest = 24 ** 2;
    points.forEach(({ across, down }, index) => {
      const distance = (across - at.x) ** 2 + (down - at.y) ** 2;
      if (distance < nearest) { nearest = distance; best = index; }
    });
    if (best < 0) hide(); else point(best);
  });
  svg.addEventListener("pointerleave", hide);
  svg.tabIndex = 0;
  svg.setAttribute("role", "application");
  svg.setAttribute("aria-roledescription", "figure; arrow keys read its points");
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) { event.preventDefault(); point((current + step + points.length) % points.length); }
    if (event.key === "Escape") hide();
  });
  svg.addEventListener("blur", hide);
}
all("[data-live]").forEach(makeFigure);
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// Links ------------------------------------------------------------------------------------------
function follow() {
  const [target, query] = location.hash.slice(1).split("?");
  if (query !== undefined) show(new URLSearchParams(query));
  const run = /^run-([0-9a-f]{12})$/.exec(target)?.[1];
  if (run && data.records[run]) { openRuns(`Run ${run}`, [run]); return; }
  const element = target && byId(target);
  if (!element) return;
  if (element.closest(".off")) showAll();  // a link to something that is filtered away
  for (let at = element; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (query !== undefined) element.scrollIntoView();
  all(".side a").forEach((link) => link.toggleAttribute("aria-current", link.hash === `#${target}`));
}
addEventListener("hashchange", follow);
document.addEventListener("click", (event) => {
  const link = event.target.closest("a.run");
  const run = link && data.records[link.textContent.trim()] ? link.textContent.trim() : null;
  if (run && !dialog.open) { event.preventDefault(); openRuns(`Run ${run}`, [run]); }
});
dialog.addEventListener("close", () => {
  if (location.hash.startsWith("#run-")) history.replaceState(null, "", "#runs");
});

// Print: everything open, then as it was.
let folded = [];
addEventListener("beforeprint", () => { folded = all("main details:not([open])"); folded.forEach((part) => { part.open = true; }); });
addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));

applyFilters();
follow();
