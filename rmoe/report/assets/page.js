"use strict";
// Draws every chart from the page's own data, in the colours of the page's theme.
const report = JSON.parse(document.getElementById("report-data").textContent);
const LINE = 19; // pixels, of a legend
const chosen = {}; // chart's id -> index of the option shown
const narrowScreen = matchMedia("(max-width: 640px)");

// Parts of the page's data are unpacked when they are first needed: what opens the page does not wait for all.
const unpacked = new Map();
function ready(node, key) {
  const done = unpacked.get(node) || {};
  unpacked.set(node, done);
  return (done[key] ??= unpack(node[key]));
}

// How many lines a chart's legend takes, about. Plotly gives all entries the width of the longest once they wrap.
function legendLines(traces, layout, width) {
  const widths = traces.filter((trace) => trace.type !== "heatmap" && trace.showlegend !== false)
    .map((trace) => 52 + 6.8 * (trace.name || "").replace(/&\w+;/g, "x").length);
  if (layout.showlegend === false || (widths.length < 2 && !layout.showlegend)) return 0;
  if (widths.reduce((a, b) => a + b, 0) <= width) return 1;
  return Math.ceil(widths.length / Math.max(1, Math.floor(width / Math.max(...widths))));
}

// A chart as it is shown now. Plotly draws into what it is given: it gets its own copy, the page's data stay.
async function current(id) {
  const chart = report.charts[id], { choice } = chart;
  const traces = structuredClone(await ready(chart, "data"));
  if (choice) {
    const index = chosen[id] ?? choice.start;
    const values = await ready(choice, "values");
    traces.forEach((trace, i) => { trace[choice.key] = structuredClone(values[i][index] ?? []); });
  }
  const { layout, height } = narrowScreen.matches && chart.narrow ? chart.narrow : chart;
  const box = document.getElementById(`chart-${id}`);
  const lines = legendLines(traces, layout, box.clientWidth - 80);
  return { traces, layout, lines, height: height + LINE * Math.max(0, lines - 1), box };
}

function themed({ layout, height, lines }, paper) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const ink = paper ? "#1d2227" : colour("--ink");
  const soft = paper ? "#5a636d" : colour("--soft");
  const grid = paper ? "#e4e4e4" : colour("--grid");
  const narrow = narrowScreen.matches;
  const full = structuredClone(layout);
  full.paper_bgcolor = full.plot_bgcolor = paper ? "#ffffff" : "rgba(0,0,0,0)";
  full.font = { family: style.getPropertyValue("--sans"), size: 12, color: soft };
  full.margin = { l: narrow ? 44 : 58, r: narrow ? 8 : 18, t: 14, b: lines ? 60 + LINE * lines : 46, ...layout.margin };
  const inside = height - full.margin.t - full.margin.b;
  full.legend = { orientation: "h", y: -52 / inside, yanchor: "top", x: 0, font: { color: ink }, ...layout.legend };
  full.hoverlabel = { bgcolor: paper ? "#ffffff" : colour("--card"), bordercolor: grid, font: { color: ink } };
  for (const key of Object.keys(full).filter((k) => /^[xy]axis\d*$/.test(k))) {
    full[key] = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, ...full[key] };
    if (full[key].title) full[key].title = { font: { size: 12, color: soft }, standoff: 8, ...full[key].title };
  }
  if (full.coloraxis) {
    const below = { orientation: "h", x: 0.5, y: -52 / inside, yanchor: "top", len: 0.9 };
    const beside = { thickness: 13, len: Math.min(1, 300 / inside), y: 1, yanchor: "top" };
    const { title, ...rest } = full.coloraxis.colorbar || {};
    full.coloraxis.colorbar = { outlinewidth: 0, thickness: 10, ...(narrow ? below : beside), ...rest,
      title: { side: narrow ? "bottom" : "top", ...title } };
  }
  for (const note of full.annotations || []) note.font = { ...note.font, color: ink };
  for (const shape of full.shapes || []) if (shape.type === "line") shape.line.color = soft;
  return full;
}

const config = { displaylogo: false, responsive: true, displayModeBar: false };
async function draw(id) {
  const now = await current(id), { box } = now;
  box.style.height = `${now.height}px`;
  // What was laid out for the other width leaves its margins behind.
  const width = narrowScreen.matches ? "narrow" : "broad";
  if (box.dataset.width && box.dataset.width !== width) Plotly.purge(box);
  box.dataset.width = width;
  return Plotly.react(box, now.traces, themed(now, false), config);
}

// One part of the page at a time, nearest first, so that it can be used meanwhile. A later call ends an earlier one.
let drawings = 0;
async function drawAll() {
  const mine = ++drawings;
  const parts = Object.keys(report.charts).map((id) => [document.getElementById(`chart-${id}`), () => draw(id)]);
  const host = document.getElementById("explorer");
  if (host && !host.hasChildNodes()) parts.push([host, async () => explorer(await ready(report, "explorer"), host)]);
  const far = ([node]) => {
    const { top, bottom } = node.getBoundingClientRect();
    return Math.max(top - innerHeight, -bottom, 0);
  };
  const near = new Map(parts.map((part) => [part, far(part)]));
  for (const part of parts.sort((a, b) => near.get(a) - near.get(b))) {
    if (mine !== drawings) return;
    await part[1]();
    await new Promise((done) => { setTimeout(done); });
  }
}

function download(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}

async function save(id, format) {
  const now = await current(id);
  const { width, height } = now.box.getBoundingClientRect();
  const figure = { data: now.traces, layout: themed(now, true), config };
  const scale = format === "png" ? 3 : 1;
  const size = { width: Math.round(width), height: Math.round(height) };
  const url = await Plotly.toImage(figure, { format, scale, ...size });
  download(url, `${id}.${format}`);
  return url;
}

// What a chart draws as rows, one for each of its numbers: a cell for each of `COLUMNS`.
const COLUMNS = ["option", "panel", "name", "text", "row", "x", "y", "low", "high"];
function* drawnRows(traces, layout, option) {
  let range; // the outline of the band around the next line
  for (const trace of traces) {
    const name = trace.meta ?? trace.name ?? "", at = Number((trace.yaxis ?? "y").slice(1) || 1) - 1;
    const title = layout.annotations?.[at]?.text ?? "", panel = title === name ? "" : title;
    if (trace.fill) range = trace.y;
    else if (trace.z)
      for (const [i, row] of trace.z.entries())
        for (const [j, value] of row.entries())
          yield { option, panel, name, row: trace.y?.[i] ?? i, x: trace.x?.[j] ?? j, y: value };
    else {
      const error = trace.error_x ?? trace.error_y, middle = trace.error_x ? trace.x : trace.y;
      for (const [i, y] of trace.y.entries()) {
        const bars = middle[i] == null || error?.array[i] == null ? null : error; // no size, no interval
        const low = range ? range.at(-1 - i) : bars && middle[i] - (bars.arrayminus ?? bars.array)[i];
        const high = range ? range[i] : bars && middle[i] + bars.array[i];
        yield { option, panel, name, text: trace.text?.[i], x: trace.x[i], y, low, high };
      }
      range = undefined;
    }
  }
}

// A chart's CSV: what it draws, for every option of its chooser; columns without a cell are left out.
async function csv(id) {
  const { layout, choice } = report.charts[id], traces = await ready(report.charts[id], "data");
  const values = choice && (await ready(choice, "values"));
  function* rows() {
    for (const [index, option] of (choice ? choice.options : [""]).entries())
      yield* drawnRows(choice ? traces.map((trace, i) => ({ ...trace, [choice.key]: values[i][index] ?? [] })) : traces, layout, option);
  }
  const used = new Set(); // told first, so that the rows of a large chart are never all kept
  for (const row of rows()) for (const name in row) if ((row[name] ?? "") !== "") used.add(name);
  const columns = COLUMNS.filter((name) => used.has(name));
  const title = (axis) => Object.keys(layout).filter((key) => key.startsWith(axis))
    .map((key) => layout[key].title?.text).find(Boolean);
  const y = title("yaxis"), colours = (layout.coloraxis ?? traces[0])?.colorbar?.title?.text;
  const heads = { option: choice?.name, row: y && `row (${y})`, x: title("xaxis"), y: colours ?? y };
  const cell = (value) => {
    if (typeof value !== "string") return String(value ?? "");
    const plain = value.replaceAll("<br>", "").replace(/&(lt|gt|amp);/g, (_, name) => ({ lt: "<", gt: ">", amp: "&" })[name]);
    const inert = /^[=+\-@\t\r]/.test(plain) ? `'${plain}` : plain; // a spreadsheet would run it as a formula
    return /[",\r\n]/.test(inert) ? `"${inert.replaceAll('"', '""')}"` : inert;
  };
  const lines = [columns.map((name) => cell(heads[name] ?? name)).join(",")];
  for (const row of rows()) lines.push(columns.map((name) => cell(row[name])).join(","));
  return `${lines.join("\n")}\n`;
}

for (const button of document.querySelectorAll("[data-csv]"))
  button.addEventListener("click", async () => {
    const url = URL.createObjectURL(new Blob([await csv(button.dataset.csv)], { type: "text/csv" }));
    download(url, `${button.dataset.csv}.csv`);
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  });
for (const format of ["svg", "png"])
  for (const button of document.querySelectorAll(`[data-${format}]`))
    button.addEventListener("click", () => save(button.dataset[format], format));

// Choosers: what a chart shows one at a time. A layer of the overview is shown in all of them.
const choosers = [...document.querySelectorAll("[data-choose]")];
for (const chooser of choosers)
  chooser.addEventListener("input", () => {
    const id = chooser.dataset.choose;
    const option = report.charts[id].choice.options[chooser.value];
    chosen[id] = Number(chooser.value);
    chooser.setAttribute("aria-valuetext", option);
    chooser.nextElementSibling.textContent = option;
    draw(id);
  });
for (const button of document.querySelectorAll("button[data-layer]"))
  button.addEventListener("click", () => {
    for (const chooser of choosers) {
      chooser.value = button.dataset.layer; // the control keeps it within its range
      chooser.dispatchEvent(new Event("input"));
    }
    choosers[0].focus({ preventScroll: true });
    choosers[0].closest("figure").scrollIntoView();
  });

const root = document.documentElement;
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
const redraw = () => { window.reportReady = drawAll(); };
try {
  root.dataset.theme = localStorage.getItem("rmoe-theme") || "";
} catch { /* a page opened from disk may have no storage */ }
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("rmoe-theme", root.dataset.theme); } catch { /* as above */ }
  redraw();
});
systemDark.addEventListener("change", redraw);
narrowScreen.addEventListener("change", redraw);

window.reportReady = drawAll();
