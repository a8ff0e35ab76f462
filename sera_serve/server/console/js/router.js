// The address of a view is after `#`: #/adapters/acme/support?version=2

import { Store } from "./store.js";

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

/** Change the address without a step in the browser's history: for what a person types into a filter. */
export function replace(parts, query = {}) {
  history.replaceState(null, "", href(parts, query));
}

function read() {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
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
