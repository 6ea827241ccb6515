"use strict";
// The token explorer: a text whose tokens and experts can be chosen. All text goes in through textContent.
function explorer(data, host) {
  if (!data || !host) return;
  const PAIRS = 8; // lines from a layer to the next
  const AROUND = 12; // tokens shown before and after one of an expert's contexts
  const NAMED = 64; // experts of a token that its line of text names
  let patterns = 0;
  const SVG = "http://www.w3.org/2000/svg";
  const make = (tag, attributes = {}, text = null) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== null) node.textContent = text;
    return node;
  };
  const draw = (tag, attributes = {}, text = null) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== null) node.textContent = text;
    return node;
  };
  const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const state = { token: 0, sides: [] };

  // The text. One tab stop; arrow keys move within it.
  const text = make("div", { class: "tokens", role: "listbox", "aria-label": `Tokens of ${data.text}`, id: "tokens" });
  const tokens = data.tokens.map((shown, index) => {
    const node = make("span", { class: "tok", role: "option", tabindex: -1, "data-token": index, "aria-selected": false });
    node.setAttribute("aria-label", `token ${index}: ${visible(shown)}`);
    for (const part of shown.split(/([ \n\t\r])/)) {
      if (!part) continue;
      if (part === "\n") node.append(make("span", { class: "ws" }, "↵"), "\n");
      else if (part === "\t") node.append(make("span", { class: "ws" }, "⇥"), "\t");
      else node.append(part);
    }
    text.append(node);
    return node;
  });
  const chooseToken = (index, focus) => {
    const old = tokens[state.token];
    old.setAttribute("aria-selected", "false");
    old.tabIndex = -1;
    state.token = Math.max(0, Math.min(tokens.length - 1, index));
    const node = tokens[state.token];
    node.setAttribute("aria-selected", "true");
    node.tabIndex = 0;
    if (focus) node.focus();
    for (const side of state.sides) side.show();
  };
  text.addEventListener("click", (event) => {
    const node = event.target.closest(".tok");
    if (node) chooseToken(Number(node.dataset.token), true);
  });
  const lineStep = (direction) => { // the token nearest below or above on the screen
    const here = tokens[state.token].getBoundingClientRect();
    for (let i = state.token + direction, seen = null; i >= 0 && i < tokens.length; i += direction) {
      const there = tokens[i].getBoundingClientRect();
      if (Math.abs(there.top - here.top) < 4) continue;
      if (seen !== null && Math.abs(there.top - seen) > 4) return i - direction;
      seen = there.top;
      if (direction > 0 ? there.left >= here.left : there.left <= here.left) return i;
    }
    return state.token;
  };
  text.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: () => state.token + 1, ArrowLeft: () => state.token - 1, Home: () => 0,
      End: () => tokens.length - 1, ArrowDown: () => lineStep(1), ArrowUp: () => lineStep(-1) };
    if (!steps[event.key]) return;
    event.preventDefault();
    chooseToken(steps[event.key](), true);
  });

  // One model: layers across, experts down, the token's path drawn through them.
  function side(start) {
    const box = make("div", { class: "side" });
    const head = make("header");
    const select = make("select", { "aria-label": "Model shown here" });
    data.models.forEach((model, i) => select.append(make("option", { value: i }, model.name)));
    select.value = start;
    const said = make("div", { class: "said", role: "status", "aria-live": "polite" });
    const map = make("div", { class: "map" });
    const detail = make("div", { class: "detail" });
    head.append(select);
    box.append(head, said, map, detail);
    const self = { box, picked: null };
    const model = () => data.models[Number(select.value)];

    const label = (layer, expert) => {
      const slot = model().chosen[state.token][layer].indexOf(expert);
      return `layer ${layer}, expert ${expert}` + (slot < 0 ? "" : `, weight ${model().weights[state.token][layer][slot].toFixed(3)}`);
    };

    // Cells are drawn where something is: a chosen expert, the one looked at. The rest is a pattern of dots.
    const grid = () => {
      const { experts, layers } = model();
      const cell = Math.max(5, Math.min(26, Math.floor(640 / experts))), gap = Math.max(20, Math.min(86, 500 / layers));
      const left = 30, top = 22;
      return { cell, gap, left, top, experts, layers, width: left + gap * layers, height: top + cell * experts + 4,
        x: (layer) => left + gap * (layer + 0.5), y: (expert) => top + cell * (expert + 0.5) };
    };
    const dot = (cell) => Math.max(1, cell * 0.2);
    const background = ({ cell, gap, left, top, experts, layers }) => {
      const id = `dots-${++patterns}`;
      const pattern = draw("pattern", { id, x: left, y: top, width: gap, height: cell, patternUnits: "userSpaceOnUse" });
      pattern.append(draw("circle", { cx: gap / 2, cy: cell / 2, r: dot(cell), class: "cell" }));
      const area = draw("rect", { x: left, y: top, width: gap * layers, height: cell * experts, fill: `url(#${id})`, class: "area" });
      area.append(draw("title"));
      return [pattern, area];
    };
    const drawCell = (layer, expert) => {
      const { cell, x, y } = grid(), path = model().chosen[state.token], weight = model().weights[state.token];
      const slot = path[layer].indexOf(expert), share = slot < 0 ? 0 : weight[layer][slot];
      const at = { cx: x(layer), cy: y(expert) };
      const node = draw("g", { role: "gridcell", tabindex: -1, "data-layer": layer, "data-expert": expert, "aria-label": label(layer, expert) });
      node.append(draw("circle", { ...at, r: dot(cell), class: "cell" }));
      const radius = Math.max(2.5, cell * (0.22 + 0.26 * share));
      if (slot >= 0) node.append(draw("circle", { ...at, r: radius, class: "on", "fill-opacity": 0.35 + 0.65 * share }));
      if (self.picked && self.picked[0] === layer && self.picked[1] === expert)
        node.append(draw("circle", { ...at, r: Math.max(5, cell * 0.48), class: "halo picked" }));
      node.append(draw("rect", { x: at.cx - cell / 2, y: at.cy - cell / 2, width: cell, height: cell, rx: 4, class: "halo", "pointer-events": "all" }));
      node.append(draw("title", {}, label(layer, expert)));
      map.querySelectorAll("g[role=row]")[layer].append(node);
      return node;
    };
    // Pairs of choices, as thick as both weights allow: all of them, or the largest where they would cover the map.
    const pairs = (weight, layer) => {
      const found = weight[layer].flatMap((a, i) => weight[layer + 1].map((b, j) => [a * b, i, j]));
      return found.length <= PAIRS ? found : found.sort(([a], [b]) => b - a).slice(0, PAIRS);
    };

    self.show = () => {
      const { chosen, weights, experts, layers } = model(), scrolled = map.scrollLeft;
      const { cell, left, width, height, x, y } = grid();
      const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "grid",
        "aria-label": `Experts of ${model().name}: layers across, experts down` });
      for (let layer = 0; layer < layers; layer++) svg.append(draw("text", { x: x(layer), y: 12, "text-anchor": "middle" }, layer));
      const every = Math.ceil(13 / cell);
      for (let expert = 0; expert < experts; expert += every)
        svg.append(draw("text", { x: left - 8, y: y(expert) + 4, "text-anchor": "end" }, expert));
      svg.append(...background(grid()));
      const path = chosen[state.token], weight = weights[state.token];
      for (let layer = 0; layer + 1 < layers; layer++)
        for (const [share, i, j] of pairs(weight, layer)) {
          const middle = (x(layer) + x(layer + 1)) / 2, a = y(path[layer][i]), b = y(path[layer + 1][j]);
          svg.append(draw("path", { class: "path", "stroke-width": (0.6 + 5 * share).toFixed(2), opacity: (0.18 + 0.6 * share).toFixed(2),
            d: `M${x(layer)},${a} C${middle},${a} ${middle},${b} ${x(layer + 1)},${b}` }));
        }
      for (let layer = 0; layer < layers; layer++) svg.append(draw("g", { role: "row" }));
      map.replaceChildren(svg);
      path.forEach((row, layer) => row.forEach((expert) => drawCell(layer, expert)));
      const start = self.picked || [0, path[0][0] ?? 0];
      at(Math.min(start[0], layers - 1), Math.min(start[1], experts - 1))?.setAttribute("tabindex", 0);
      map.scrollLeft = scrolled;
      const few = path.flat().length <= NAMED;
      said.textContent = `“${visible(data.tokens[state.token])}” (token ${state.token}) goes to ` +
        (few ? path.map((row) => row.join(" + ")) : path.map((row) => row[0] ?? "none")).join(" → ") +
        (few ? "" : " (the expert of largest weight in each layer)");
    };
    // The cell of an expert, drawn if it is not there yet; null outside the map.
    const at = (layer, expert) => {
      const { experts, layers } = model();
      if (layer < 0 || expert < 0 || layer >= layers || expert >= experts) return null;
      return map.querySelector(`g[data-layer="${layer}"][data-expert="${expert}"]`) || drawCell(layer, expert);
    };
    const under = (event) => { // what is chosen by a click, on a cell or between them
      const node = event.target.closest("g[data-expert]");
      if (node) return where(node);
      const area = map.querySelector(".area").getBoundingClientRect(), { experts, layers } = model();
      const layer = Math.floor(((event.clientX - area.left) / area.width) * layers);
      const expert = Math.floor(((event.clientY - area.top) / area.height) * experts);
      return layer >= 0 && layer < layers && expert >= 0 && expert < experts ? [layer, expert] : null;
    };
    const where = (node) => [Number(node.dataset.layer), Number(node.dataset.expert)];

    self.pick = (layer, expert) => {
      for (const other of state.sides) if (other !== self) other.clear();
      self.picked = [layer, expert];
      self.show();
      tokens.forEach((node, i) => node.classList.toggle("hit", model().chosen[i][layer].includes(expert)));
      const hits = model().chosen.filter((rows) => rows[layer].includes(expert)).length;
      const top = model().top, rows = (top.text[layer]?.[expert] || []).map((text, i) =>
        [text, top.count[layer][expert][i], top.count[layer][expert][i] / top.total[layer][expert]]);
      const table = make("table");
      table.append(make("caption", {}, `${model().name}, layer ${layer}, expert ${expert}: chosen for ${hits} of ${tokens.length} tokens here (marked above). ` +
        (rows.length ? "Over the whole text it takes most:" : "")));
      const body = make("tbody");
      for (const [token, count, share] of rows) {
        const row = make("tr"), bar = make("td", { class: "text" });
        bar.append(make("span", { class: "bar", style: `width:${(7 * share / rows[0][2]).toFixed(2)}rem` }));
        row.append(make("td", { class: "text" }, visible(token)), make("td", {}, count.toLocaleString("en")), make("td", {}, percent(share)), bar);
        body.append(row);
      }
      if (rows.length) {
        const header = make("tr");
        for (const [title, kind] of [["token", "text"], ["times", ""], ["share of its tokens", ""], ["", "text"]])
          header.append(make("th", { scope: "col", class: kind }, title));
        const head = make("thead");
        head.append(header);
        table.append(head);
      }
      table.append(body);
      detail.replaceChildren(table);
      const list = contexts(layer, expert);
      if (list) detail.append(list);
    };
    // Where in the whole text the expert has its largest weights, the token marked.
    const contexts = (layer, expert) => {
      const found = model().contexts;
      const positions = (found?.positions[layer]?.[expert] || []).filter((position) => position >= 0);
      if (!positions.length) return null;
      const list = make("ol", { class: "contexts" });
      const part = (from, to) => found.text.slice(Math.max(0, from), to).map((id) => visible(found.vocabulary[id])).join("");
      positions.forEach((position, i) => {
        const item = make("li"), text = make("span", { class: "context" });
        text.append(part(position - AROUND, position), make("mark", {}, part(position, position + 1)), part(position + 1, position + AROUND + 1));
        item.append(make("span", { class: "weight" }, found.weights[layer][expert][i].toFixed(3)), text);
        list.append(item);
      });
      const box = make("div");
      box.append(make("p", { class: "where" }, "Where its weight is largest:"), list);
      return box;
    };
    self.clear = () => {
      self.picked = null;
      detail.replaceChildren();
      self.show();
    };
    map.addEventListener("click", (event) => {
      const found = under(event);
      if (!found) return;
      self.pick(...found);
      at(...found).focus({ preventScroll: true });
    });
    map.addEventListener("pointermove", (event) => {
      const found = event.target.classList.contains("area") && under(event);
      if (found) event.target.firstChild.textContent = label(...found);
    });
    map.addEventListener("keydown", (event) => {
      const node = event.target.closest("g[data-expert]");
      if (!node) return;
      let [layer, expert] = where(node);
      const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        self.pick(layer, expert);
        at(layer, expert).focus();
      } else if (moves[event.key]) {
        event.preventDefault();
        const next = at(layer + moves[event.key][0], expert + moves[event.key][1]);
        if (!next) return;
        node.setAttribute("tabindex", -1);
        next.setAttribute("tabindex", 0);
        next.focus();
      }
    });
    select.addEventListener("change", () => {
      tokens.forEach((token) => token.classList.remove("hit"));
      self.clear();
    });
    return self;
  }

  const broad = data.models.some((model) => model.layers > 22);
  const sides = make("div", { class: broad ? "sides broad" : "sides" });
  const count = Math.min(2, data.models.length);
  for (let i = 0; i < count; i++) {
    const one = side(i);
    state.sides.push(one);
    sides.append(one.box);
  }
  const frame = make("div", { class: "explorer" });
  frame.append(text, sides);
  host.append(frame);
  chooseToken(0, false);
}
