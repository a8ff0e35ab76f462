// Line charts over time or over steps, drawn by uPlot in the page's own colours.

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { html, useEffect, useRef } from "./html.js";
import { onAxis } from "./format.js";

const HEIGHT = 190;
let isStyled = false;

/** uPlot's style sheet, which only pages with charts need. */
function addStyle() {
  if (isStyled) return;
  isStyled = true;
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("../vendor/uplot/uPlot.min.css", import.meta.url).href;
  document.head.append(link);
}

const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function optionsOf(width, series, isTime, format, least, most) {
  const axis = {
    stroke: colourOf("muted"),
    font: "12px Inter, system-ui, sans-serif",
    grid: { stroke: colourOf("line"), width: 1 },
    ticks: { show: false },
  };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    cursor: { points: { size: 7 }, drag: { x: false, y: false } },
    scales: { x: { time: isTime }, y: { range: (_plot, low, high) => rangeOf(low, high, least, most) } },
    axes: [
      { ...axis, size: 28, gap: 6, grid: { show: false }, values: isTime ? (_plot, ticks) => ticks.map(clock) : undefined, space: 80 },
      { ...axis, size: 54, gap: 6, space: 30, values: (_plot, ticks) => ticks.map(format) },
    ],
    series: [{}, ...series.map(({ colour, dashed, isSparse }) => ({
      stroke: colourOf(colour),
      width: 2,
      dash: dashed ? [6, 4] : undefined,
      spanGaps: Boolean(isSparse),
      points: { show: Boolean(isSparse), size: 6 },
      fill: series.length === 1 ? `${colourOf(colour)}1f` : undefined,
    }))],
  };
}

function rangeOf(low, high, least, most) {
  if (most !== undefined) return [least, most];
  if (low === null || high === null || high === least) return [0, 1];
  // A scale from 0 where the values are rates; the values' own where they are losses.
  const bottom = least === null ? low - (high - low || 1) * 0.08 : least;
  return [bottom, high + (high - bottom || 1) * 0.12];
}

const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

/**
 * A chart. `series` are {label, colour, latest, dashed, isSparse}; `data` are uPlot's columns: x, then one for each.
 *
 * The latest values stand in the legend as text, for people who do not see the lines.
 */
export function Chart({ title, series, data, isTime = true, format = onAxis, least = 0, most = undefined }) {
  const box = useRef(null);
  const plot = useRef(null);
  const shape = JSON.stringify(series.map(({ label, colour }) => [label, colour]));
  useEffect(() => {
    addStyle();
    const element = box.current;
    const draw = (shown) => {
      const width = element.clientWidth;
      plot.current = new uPlot(optionsOf(width, series, isTime, format, least, most), shown, element);
    };
    draw(data);
    const resize = new ResizeObserver(() => {
      const width = element.clientWidth;
      if (width > 0 && width !== plot.current.width) plot.current.setSize({ width, height: HEIGHT });
    });
    resize.observe(element);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const redraw = () => {
      // What came since the first drawing, too.
      const shown = plot.current.data;
      plot.current.destroy();
      draw(shown);
    };
    scheme.addEventListener("change", redraw);
    return () => {
      resize.disconnect();
      scheme.removeEventListener("change", redraw);
      plot.current.destroy();
      plot.current = null;
    };
  }, [shape]);
  useEffect(() => plot.current?.setData(data), [data]);
  return html`<section class="card chart" aria-label=${title}>
    <div class="chart-head">
      <h2>${title}</h2>
      <ul class="legend">${series.map(({ label, colour, latest }) => html`<li key=${label} style=${{ "--lane": `var(--${colour})` }}>
        <span class="dot"></span>${label} <strong>${latest ?? "-"}</strong></li>`)}</ul>
    </div>
    <div class="plot" ref=${box} aria-hidden="true"></div>
  </section>`;
}

/** One figure with its name. */
export function Stat({ term, value, unit }) {
  return html`<dl class="stat"><dt>${term}</dt><dd>${value}${unit && html` <small>${unit}</small>`}</dd></dl>`;
}
