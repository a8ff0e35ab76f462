// Who uses this tab: the key, and what it may do.

import { ApiError, get, isAbort, onRefusedKey, setKey } from "./api.js";
import { Store, connectionEpoch } from "./store.js";

// Of this tab alone: another tab may have another key, and closing the tab forgets the key.
const STORED = "sera-serve.key";

/** `state` is "loading", "open" (there is `me`), "closed" (a key is needed) or "failed" (there is `error`). */
export const session = new Store({ state: "loading", me: null, error: null });

// Whose work the views hold: they keep what a person typed.
let tenant = null;

/** Find out whether the server takes this tab's key, or needs none. */
export async function begin() {
  setKey(sessionStorage.getItem(STORED));
  try {
    const me = await get("/v1/me");
    tenant = me.tenant;
    session.set({ state: "open", me, error: null });
  } catch (error) {
    if (isAbort(error)) return;
    if (error.status === 401) close(sessionStorage.getItem(STORED) === null ? null : error);
    else session.set({ state: "failed", me: null, error });
  }
}

/** Use a key. Throws what the server says against it. */
export async function signIn(secret) {
  if (!/^[\x21-\x7e]+$/.test(secret)) {
    // No header could carry it.
    const message = "a key has letters without accents, digits and signs alone; copy it again, without line breaks";
    throw new ApiError(401, { error: { message, param: "key" } });
  }
  setKey(secret);
  try {
    const me = await get("/v1/me");
    sessionStorage.setItem(STORED, secret);
    if (tenant !== null && tenant !== me.tenant) {
      // Another tenant sees nothing of what was typed, or named in the address, before.
      // Without a navigation of its own, which could end after the page is there again.
      history.replaceState(null, "", location.pathname);
      location.reload();
      return;
    }
    tenant = me.tenant;
    session.set({ state: "open", me, error: null });
  } catch (error) {
    setKey(null);
    throw error;
  }
}

/** Forget the key. */
export function signOut() {
  close(null);
}

function close(error) {
  sessionStorage.removeItem(STORED);
  setKey(null);
  session.set({ state: "closed", me: null, error });
}

// A key that was revoked while it was used.
onRefusedKey((error) => {
  if (session.value.state === "open") close(error);
});

// A page that came while the server was away.
connectionEpoch.watch(() => {
  if (session.value.state === "failed") begin();
});

/** Whether the key has a scope. Where the server needs no key, everyone may do everything. */
export function may(me, scope) {
  return !me.needs_keys || me.scopes.includes(scope) || me.scopes.includes("admin");
}

/** Whether the key may change an adapter. */
export function mayChange(me, adapter) {
  if (!may(me, "publish")) return false;
  return me.tenant === null || me.scopes.includes("admin") || adapter.startsWith(`${me.tenant}/`);
}
