// Words of an adapter that several views show in the same way.

import { html } from "./html.js";
import { Badge } from "./ui.js";

const TIERS = { device: "on the device: it answers at once", host: "in the host's memory", store: "on disk" };

const VIEWS = { generate: "playground", classify: "classify", regress: "classify", "token-classify": "classify" };

/** Tasks of adapters that the view Classify takes, with commas between them. */
export const TEXT_HEADS = Object.keys(VIEWS).filter((task) => VIEWS[task] === "classify").join(",");

/** The view in which an adapter of a task can be tried, or null. */
export function viewOf(task) {
  return VIEWS[task] ?? null;
}

/** What an adapter is for. */
export function TaskBadge({ task }) {
  return html`<${Badge} tone=${task === "generate" ? "accent" : "violet"}>${task}<//>`;
}

/** Where an adapter is now. */
export function Tier({ tier, pinned }) {
  const title = pinned ? "kept on the device" : TIERS[tier];
  return html`<span class=${`tier ${tier}`} title=${title}><span class="dot"></span>${pinned ? "pinned" : tier}</span>`;
}
