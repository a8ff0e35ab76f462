// The address of a view is after `#`: #/adapters/acme/support?version=2

import { useLayoutEffect } from "./html.js";
import { Store } from "./store.js";

// The address that `route` was read from, or that `replace` wrote.
let followed;

/** The view that the address names: `{parts, query}`. */
export const route = new Store(read());

/** The address of a view. */
export function href(parts, query = {}) {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const one of [value].flat()) if (one !== null && one !== undefined && one !== "") search.append(name, one);
  }
  const tail = search.toString();
  return `#/${parts.map(encodeURIComponent).join("/").replaceAll("%40", "@")}${tail && `?${tail}`}`;
}

/** Go to a view. */
export function go(parts, query = {}) {
  location.hash = href(parts, query);
}

/** Go to a view if a person has not left the view `from` meanwhile. Returns whether it goes. */
export function goOn(from, parts) {
  const isThere = route.value.parts.join("/") === from.join("/");
  if (isThere) go(parts);
  return isThere;
}

/**
 * Change the address without a step in the browser's history: for what a person types into a filter.
 *
 * A view calls it in a layout effect: later, it would take the place of a link that was followed meanwhile.
 */
export function replace(parts, query = {}) {
  // A link that was followed while the view was made: its event is on the way, and the view goes.
  if (location.hash !== followed) return;
  history.replaceState(null, "", href(parts, query));
  followed = location.hash;
}

/**
 * Call `action(query)` when the address changes and the view `name` stays: by the menu, by a link, by the way back.
 *
 * `replace` is a view's own change, and calls nothing.
 */
export function useAddress(name, action) {
  // Before the next event: an address that came between would be missed.
  useLayoutEffect(() => route.watch(({ parts, query }) => {
    if (parts.length === 1 && parts[0] === name) action(query);
  }), []);
}

function read() {
  followed = location.hash;
  const [path, search = ""] = followed.replace(/^#\/?/, "").split("?");
  // Dots would lead a request to another path of the API.
  const parts = path.split("/").map(decoded).filter((part) => !["", ".", ".."].includes(part));
  return { parts, query: new URLSearchParams(search) };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

addEventListener("hashchange", () => route.set(read()));
