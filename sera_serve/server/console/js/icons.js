// Small drawings for buttons and the menu. They are decoration: a text is always beside them, or in a label.

import { html } from "./html.js";

const PATHS = {
  adapters: "M3 3h5v5H3zM9.5 9.5h5v5h-5zM16 16h5v5h-5z",
  playground: "M4 5h16v11H10l-4 4v-4H4zM8 9h8M8 12.500h5",
  classify: "M4 6h9M4 12h16M4 18h6",
  upload: "M12 16V4m0 0-5 5m5-5 5 5M4 16v4h16v-4",
  training: "M4 4v16h16M7 8c2 0 2 7 5 7s3 2 8 2",
  live: "M3 12h4l3-8 4 16 3-8h4",
  keys: "M15.5 4a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9zM12.3 11.7 4 20v0h3.5v-2.5H10V15M15.5 8.5h.01",
  quotas: "M4 18a8 8 0 1 1 16 0M12 18l4-6",
  menu: "M4 6h16M4 12h16M4 18h16",
  close: "M6 6l12 12M18 6 6 18",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 13l4 4L19 7",
  pin: "M9 4h6l-1 6 3 3H7l3-3zM12 13v7",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  share: "M12 15V4m0 0L8 8m4-4 4 4M6 12H5v8h14v-8h-1",
  stop: "M7 7h10v10H7z",
  play: "M8 5v14l11-7z",
  plus: "M12 5v14M5 12h14",
  back: "M14 6l-6 6 6 6",
  warning: "M12 4 2.5 20h19zM12 10v4M12 17h.01",
  leave: "M14 4H5v16h9M10 12h11m0 0-4-4m4 4-4 4",
};

/** A drawing by its name. */
export function Icon({ name, size = 18 }) {
  return html`<svg class="icon" width=${size} height=${size} viewBox="0 0 24 24" aria-hidden="true">
    <path d=${PATHS[name]} />
  </svg>`;
}

/** The mark of the project: segments on a diagonal. */
export function Mark() {
  return html`<svg class="mark" width="28" height="28" viewBox="0 0 32 32" aria-hidden="true">
    <rect class="mark-ground" width="32" height="32" rx="7" />
    <rect class="mark-block" x="6" y="6" width="6.5" height="6.5" rx="1.5" />
    <rect class="mark-block" x="12.75" y="12.75" width="6.5" height="6.5" rx="1.5" opacity=".8" />
    <rect class="mark-block" x="19.5" y="19.5" width="6.5" height="6.5" rx="1.5" opacity=".6" />
  </svg>`;
}
