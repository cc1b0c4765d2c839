"use strict";
(function () {
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const drawn = [];

  // Text and grid follow the page's theme; the data's own colours suit both.
  function themed(layout) {
    const axis = { gridcolor: style("--grid"), linecolor: style("--line"), zerolinecolor: style("--line"), tickcolor: style("--line") };
    const out = Object.assign({}, layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", size: 13, color: style("--ink") },
      hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink") } },
    });
    out.xaxis = Object.assign({}, axis, layout.xaxis);
    out.yaxis = Object.assign({}, axis, layout.yaxis);
    return out;
  }

  function draw(element) {
    const source = document.getElementById(element.dataset.figure);
    if (!source || element.dataset.drawn) return;
    element.dataset.drawn = "yes";
    const figure = JSON.parse(source.textContent);
    const config = { displaylogo: false, displayModeBar: false, responsive: true, showLink: false, plotlyServerURL: "" };
    Plotly.newPlot(element, figure.data, themed(figure.layout), config);
    drawn.push([element, figure.layout]);
  }

  function drawVisible(root) {
    root.querySelectorAll(".chart").forEach((element) => {
      if (!element.closest("details:not([open])")) draw(element);
    });
  }

  // Numbers sort as numbers, whatever separators and units stand beside them.
  function key(cell) {
    const text = cell.textContent.trim();
    const number = parseFloat(text.replace(/,/g, ""));
    return cell.classList.contains("n") ? (Number.isNaN(number) ? -Infinity : number) : text.toLowerCase();
  }

  function sortBy(header) {
    const table = header.closest("table");
    const body = table.tBodies[0];
    const index = header.cellIndex;
    const up = header.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = Array.from(body.rows);
    rows.sort((a, b) => {
      const x = key(a.cells[index]), y = key(b.cells[index]);
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
    });
    rows.forEach((row) => body.appendChild(row));
  }

  function filter(input) {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const table = document.getElementById(input.dataset.table);
    Array.from(table.tBodies[0].rows).forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    });
  }

  document.querySelectorAll("th[data-sort]").forEach((header) => {
    header.tabIndex = 0;
    header.addEventListener("click", () => sortBy(header));
    header.addEventListener("keydown", (event) => { if (event.key === "Enter") sortBy(header); });
  });
  document.querySelectorAll("input.filter").forEach((input) => input.addEventListener("input", () => filter(input)));
  document.querySelectorAll("details").forEach((box) => box.addEventListener("toggle", () => { if (box.open) drawVisible(box); }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    drawn.forEach(([element, layout]) => Plotly.relayout(element, themed(layout)));
  });
  drawVisible(document);
})();
