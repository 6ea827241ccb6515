"use strict";
// Draws every chart from the page's own data, in the colours of the page's theme.
const report = JSON.parse(document.getElementById("report-data").textContent);

function themed(layout, paper) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const ink = paper ? "#1d2227" : colour("--ink");
  const soft = paper ? "#5a636d" : colour("--soft");
  const grid = paper ? "#e4e4e4" : colour("--grid");
  const full = structuredClone(layout);
  full.paper_bgcolor = full.plot_bgcolor = paper ? "#ffffff" : "rgba(0,0,0,0)";
  full.font = { family: style.getPropertyValue("--sans"), size: 12, color: soft };
  full.margin = { l: 58, r: 18, t: 14, b: 46, ...layout.margin };
  full.legend = { orientation: "h", y: -0.2, yanchor: "top", x: 0, font: { color: ink }, ...layout.legend };
  full.hoverlabel = { bgcolor: paper ? "#ffffff" : colour("--card"), bordercolor: grid, font: { color: ink } };
  for (const key of Object.keys(full).filter((k) => /^[xy]axis\d*$/.test(k))) {
    full[key] = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, ...full[key] };
    if (full[key].title) full[key].title = { font: { size: 12, color: soft }, standoff: 8, ...full[key].title };
  }
  if (full.coloraxis) {
    full.coloraxis.colorbar = { outlinewidth: 0, thickness: 13, len: 0.8, ...full.coloraxis.colorbar };
  }
  for (const note of full.annotations || []) note.font = { ...note.font, color: ink };
  for (const shape of full.shapes || []) if (shape.type === "line") shape.line.color = soft;
  return full;
}

// Plotly draws into what it is given: every drawing gets its own copy, so the page's data stay as they were.
const config = { displaylogo: false, responsive: true, displayModeBar: false };
const draw = (id) => {
  const { data, layout } = report.charts[id];
  return Plotly.react(`chart-${id}`, structuredClone(data), themed(layout, false), config);
};
const drawAll = () => Promise.all(Object.keys(report.charts).map(draw));

async function save(id, format) {
  const { data, layout } = report.charts[id];
  const box = document.getElementById(`chart-${id}`).getBoundingClientRect();
  const figure = { data: structuredClone(data), layout: themed(layout, true), config };
  const scale = format === "png" ? 3 : 1;
  const size = { width: Math.round(box.width), height: Math.round(box.height) };
  const url = await Plotly.toImage(figure, { format, scale, ...size });
  const link = document.createElement("a");
  link.href = url;
  link.download = `${id}.${format}`;
  link.click();
  return url;
}

for (const format of ["svg", "png"])
  for (const button of document.querySelectorAll(`[data-${format}]`))
    button.addEventListener("click", () => save(button.dataset[format], format));

const root = document.documentElement;
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
try {
  root.dataset.theme = localStorage.getItem("rmoe-theme") || "";
} catch { /* a page opened from disk may have no storage */ }
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("rmoe-theme", root.dataset.theme); } catch { /* as above */ }
  drawAll();
});
systemDark.addEventListener("change", drawAll);

window.reportReady = drawAll();
