// Words of an adapter that several views show in the same way.

import { html } from "./html.js";
import { Badge } from "./ui.js";

const TIERS = { device: "on the device: it answers at once", host: "in the host's memory", store: "on disk" };

/** What an adapter is for. */
export function TaskBadge({ task }) {
  return html`<${Badge} tone=${task === "classify" ? "violet" : "accent"}>${task}<//>`;
}

/** Where an adapter is now. */
export function Tier({ tier, pinned }) {
  const title = pinned ? "kept on the device" : TIERS[tier];
  return html`<span class=${`tier ${tier}`} title=${title}><span class="dot"></span>${pinned ? "pinned" : tier}</span>`;
}
