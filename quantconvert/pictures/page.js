"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((head, column) => {
    let up = false;
    const sort = () => {
      up = !up;
      const key = (row) => row.cells[column].textContent;
      const order = (a, b) => {
        const x = key(a), y = key(b), d = Number(x) - Number(y);
        return (Number.isNaN(d) ? x.localeCompare(y) : d) * (up ? 1 : -1);
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(order));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
}
const data = document.getElementById("data");
if (data) {
  const { rows, low, high, colours } = JSON.parse(data.textContent);
  const row = document.getElementById("row"), layer = document.getElementById("layer");
  const canvas = document.getElementById("canvas"), said = document.getElementById("said");
  let values = [];
  const add = (select, text) => { const o = document.createElement("option"); o.textContent = text; select.append(o); };
  const draw = () => {
    const text = rows[row.value][layer.value] || "";
    values = (text.match(/../g) || []).map((pair) => (pair === "--" ? null : parseInt(pair, 36) / 10));
    canvas.height = 20 * Math.ceil(values.length / 35) || 20;
    const context = canvas.getContext("2d");
    values.forEach((value, i) => {
      if (value === null) return;
      const share = Math.min(1, Math.max(0, (value - low) / (high - low)));
      context.fillStyle = colours[Math.round(share * (colours.length - 1))];
      context.fillRect(20 * (i % 35), 20 * Math.floor(i / 35), 19, 19);
    });
    const there = values.filter((value) => value !== null);
    said.textContent = there.length ? `${there.length} experts, ${Math.min(...there)} to ${Math.max(...there)} dB` : "";
  };
  const fill = () => { layer.textContent = ""; Object.keys(rows[row.value]).forEach((k) => add(layer, k)); draw(); };
  canvas.addEventListener("mousemove", (event) => {
    const scale = canvas.width / canvas.clientWidth;
    const i = Math.floor((event.offsetX * scale) / 20) + 35 * Math.floor((event.offsetY * scale) / 20);
    if (values[i] !== undefined && values[i] !== null) canvas.title = `expert ${i}: ${values[i]} dB`;
  });
  Object.keys(rows).forEach((k) => add(row, k));
  row.addEventListener("change", fill);
  layer.addEventListener("change", draw);
  fill();
}
