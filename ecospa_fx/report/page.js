"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const plans = data.replanning;
  const views = {};

  // -- small helpers: every text goes in as text, never as markup
  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
  const sizes = (shape) => shape.map((n) => n.toLocaleString("en")).join(" × ");
  const row = (cells, tag = "td") => {
    const line = element("tr");
    for (const cell of cells) line.append(cell instanceof Node ? cell : element(tag, cell));
    return line;
  };
  const table = (head, rows) => {
    const made = element("table"), top = element("thead"), body = element("tbody"), around = element("div", undefined, "scroll");
    top.append(row(head, "th"));
    body.append(...rows);
    made.append(top, body);
    around.append(made);
    return around;
  };
  const sourceLine = (source) => {
    const [place, ...code] = source.split(": ");
    const line = element("code", `${place.split(/[\\/]/).pop()}: ${code.join(": ")}`, "source");
    line.title = place;
    return line;
  };
  const withSource = (text, source) => {
    const cell = element("td", text);
    if (source) cell.append(sourceLine(source));
    return cell;
  };

  // -- cards are filled when they are opened
  const note = (title, n) => {
    const part = element("div", undefined, "refusal");
    part.append(element("h3", title), element("p", n.message), element("p", `by ${n.operator} at ${n.node}`));
    if (n.source) part.append(sourceLine(n.source));
    if (n.remedy) part.append(element("p", `What lifts it: ${n.remedy}`));
    return part;
  };
  const member = ([parameter, axis, role, dense, small, where]) => {
    const shape = sizes(dense) === sizes(small) ? sizes(dense) : `${sizes(dense)} → ${sizes(small)}`;
    return row([parameter, role, `axis ${axis}`, shape, where]);
  };
  const fill = (details) => {
    const body = details.querySelector(".body"), card = data.cards[details.dataset.n];
    if (body.childNodes.length) return;
    const times = card.carriers > 1 ? ` × ${card.carriers} carriers` : "";
    body.append(element("p", `${card.size.toLocaleString("en")} units${times}, symmetry ${card.symmetry}, ` +
      `${card.parameters.toLocaleString("en")} parameters, in ${card.layer || "the root"}`));
    if (card.blocked) body.append(note("Refused", card.blocked));
    if (card.inexact) body.append(note("Inexact", card.inexact));
    if (card.resized) body.append(note("Changes a size", card.resized));
    body.append(element("h3", "Members"), table(["parameter", "role", "axis", "shape", "units lie"], card.members.map(member)));
    if (card.path.length) {
      const steps = card.path.map(([node, number], i) => {
        const [operator, action, module, source] = data.steps[number];
        return row([String(i + 1), node, operator, action, withSource(module, source)]);
      });
      body.append(element("h3", "Evidence"), table(["", "node", "operator", "what it does to the units", "module and line"], steps));
    }
    if (card.contains.length) body.append(element("h3", "Contains"), element("p", card.contains.join(", ")));
  };
  const cards = [...document.querySelectorAll("#cards details")];
  for (const details of cards) details.addEventListener("toggle", () => details.open && fill(details));
  const open = () => {
    const target = /^#c\d+$/.test(location.hash) && document.querySelector(location.hash);
    if (!target) return;
    target.hidden = false;
    target.open = true;
    fill(target);
    target.scrollIntoView({ block: "start" });
    target.querySelector("summary").focus({ preventScroll: true });
  };
  addEventListener("hashchange", open);

  // -- the filter
  const texts = data.cards.map((card) => [
    card.name, ...card.members.map((m) => m[0]), ...card.path.map(([, n]) => data.steps[n][0]),
    card.blocked ? `${card.blocked.message} ${card.blocked.operator}` : "",
  ].join(" ").toLowerCase());
  const filter = () => {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = byId("kind").value, state = byId("state").value;
    let shown = 0;
    cards.forEach((details, n) => {
      const card = data.cards[n];
      const fits = words.every((word) => texts[n].includes(word)) && (kind === "" || card.kind === Number(kind)) &&
        (state === "" || (state === "refused") === Boolean(card.blocked));
      details.hidden = !fits;
      shown += fits;
    });
    byId("count").textContent = `${shown.toLocaleString("en")} of ${cards.length.toLocaleString("en")}`;
  };
  for (const id of ["search", "kind", "state"]) byId(id).addEventListener("input", filter);
  document.querySelector(".filter").addEventListener("submit", (event) => event.preventDefault());
  filter();

  // -- the ratio: plans were made beforehand, and are only chosen here
  const keptAt = (n, number) => {
    const card = data.cards[n];
    if (number === null) return card.kept;
    if (card.blocked) return null;
    const widths = plans.widths[n];
    return widths === undefined || number < 0 ? 1 : widths[number] / card.size;
  };
  const unitsAt = (n, number) => {
    const card = data.cards[n];
    if (number === null) return card.units[0] === card.units[1] ? `${card.units[0]}` : `${card.units[0]}–${card.units[1]}`;
    return plans.widths[n] === undefined || number < 0 ? `${card.size}` : `${plans.widths[n][number]}`;
  };
  const cellsOf = [...document.querySelectorAll(".heat .cell")].map((cell) => [cell, Number(cell.dataset.n)]);
  const paint = (number) => {
    for (const [cell, n] of cellsOf) {
      const kept = keptAt(n, number);
      if (kept === null) continue;
      cell.style.setProperty("--kept", kept.toFixed(4));
      if (cell.textContent) cell.textContent = (100 * kept).toFixed(0);
      cell.setAttribute("aria-label", `${data.cards[n].name}: ${percent(kept)} kept`);
    }
    cards.forEach((details, n) => {
      const kept = keptAt(n, number);
      if (kept !== null) details.querySelector(".state").textContent = `keeps ${unitsAt(n, number)} (${percent(kept)})`;
    });
  };
  const exchange = (key, name, rows) => {
    if (views[key]) views[key].data(name, rows).runAsync();
  };
  const choose = (number) => {
    paint(number);
    const rows = [];
    if (number !== null && number >= 0) {
      for (const [n, scores] of Object.entries(plans.marginal)) {
        const card = data.cards[n];
        if (scores[number] === null) continue;
        rows.push({ coupling: card.name, kind: data.kinds[card.kind], share: 1 - plans.widths[n][number] / card.size, score: scores[number] });
      }
    }
    exchange("curves", "cut", rows);
    const flops = number === null || number < 0 ? 1 : plans.flops[number];
    const left = number === null || number < 0 ? 1 : 1 - plans.removed[number] / plans.parameters;
    if (plans.flops.length) exchange("sizes", "here", number === null ? [] : [{ parameters: left, FLOPs: flops }]);
    const work = plans.flops.length ? `, ${percent(flops, 1)} of FLOPs` : "";
    byId("chosen").textContent = number === null ? "the plan that was given" :
      `${percent(number < 0 ? 0 : plans.ratios[number])}: ${percent(left, 1)} of the parameters left${work}`;
  };
  const slider = byId("ratio");
  const given = byId("given");
  if (slider) {
    slider.addEventListener("input", () => choose(Number(slider.value) - 1));
    if (given) given.addEventListener("click", () => choose(null));
    choose(given ? null : -1);
  }

  // -- charts
  Promise.all(Object.entries(data.charts).map(async ([key, spec]) => {
    const result = await vegaEmbed(`#${key}`, spec, { renderer: "svg", actions: false, tooltip: { theme: "custom" } });
    views[key] = result.view;
  })).then(() => {
    if (slider) choose(given ? null : -1);
    document.documentElement.dataset.ready = "yes";
  });
  open();
})();
