"use strict";
// Names the number under the pointer. The pictures carry everything else, so the page works without this script.
(() => {
  const MISSING = 65535;
  const spec = JSON.parse(document.getElementById("tables").textContent);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  const decoded = {};
  function number(table, index) {
    const about = spec[table];
    if (!decoded[table]) {
      const text = atob(about.data);
      decoded[table] = Uint16Array.from({ length: text.length / 2 },
        (_, i) => text.charCodeAt(2 * i) | (text.charCodeAt(2 * i + 1) << 8));
    }
    const raw = decoded[table][index];
    return raw === MISSING || raw === undefined ? "none" : (raw * about.scale + about.base).toFixed(about.digits) + about.unit;
  }

  function lines(region, x, y) {
    const [left, top, right, bottom] = region.box;
    const columns = typeof region.columns === "number" ? region.columns : region.columns.length;
    const column = Math.min(columns - 1, Math.floor((x - left) / (right - left) * columns));
    const row = Math.min(region.rows.length - 1, Math.floor((y - top) / (bottom - top) * region.rows.length));
    const place = typeof region.columns === "number" ? "expert " + column : region.columns[column];
    const cell = r => number(region.table, region.offset + r * region.row_stride + column * region.col_stride);
    if (region.series) return [place, ...region.rows.map((name, r) => `${name}: ${cell(r)}`)];
    return [[region.title, region.rows[row], place].filter(Boolean).join(" · "), cell(row)];
  }

  for (const figure of document.querySelectorAll("figure[data-regions]")) {
    const regions = JSON.parse(figure.dataset.regions);
    const image = figure.querySelector("img");
    const show = event => {
      const frame = image.getBoundingClientRect();
      const x = (event.clientX - frame.left) / frame.width;
      const y = (event.clientY - frame.top) / frame.height;
      const region = regions.find(({ box }) => x >= box[0] && y >= box[1] && x < box[2] && y < box[3]);
      tip.hidden = !region;
      if (!region) return;
      tip.replaceChildren(...lines(region, x, y).map(text => {
        const line = document.createElement("div");
        line.textContent = text;
        return line;
      }));
      const width = tip.offsetWidth, height = tip.offsetHeight;
      tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4)) + "px";
      tip.style.top = (event.clientY - height - 14 > 0 ? event.clientY - height - 14 : event.clientY + 18) + "px";
    };
    image.addEventListener("pointermove", show);
    image.addEventListener("pointerdown", show);
    image.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
})();
