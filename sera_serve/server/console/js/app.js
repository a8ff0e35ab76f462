// The shell: the menu, the key, the connection, and the view that the address names.

import { html, render, useEffect, useErrorBoundary, useRef, useState } from "./html.js";
import { ConnectionLost, get, isConnected } from "./api.js";
import { Icon, Mark } from "./icons.js";
import { href, route } from "./router.js";
import { begin, may, session, signOut } from "./session.js";
import { connectionEpoch, useStore } from "./store.js";
import { Badge, Button, ErrorNote, Loading, MissingScope, Notices } from "./ui.js";
import { isForAnotherBase, WrongBase } from "./wrong_base.js";

// By the first part of the address: title, the scope that the view needs (null: any key), its code.
const VIEWS = {
  adapters: { title: "Adapters", scope: null, load: () => import("./views/adapters.js") },
  playground: { title: "Playground", scope: "infer", load: () => import("./views/playground.js") },
  classify: { title: "Classify", scope: "infer", load: () => import("./views/classify.js") },
  upload: { title: "Upload", scope: "publish", load: () => import("./views/upload.js") },
  training: { title: "Training", scope: "train", load: () => import("./views/training.js") },
  live: { title: "Live", scope: "admin", load: () => import("./views/live.js") },
  keys: { title: "Keys", scope: "admin", load: () => import("./views/keys.js") },
  quotas: { title: "Quotas", scope: null, load: () => import("./views/quotas.js") },
};
const MENU = [
  ["Use", ["playground", "classify"]],
  ["Ship", ["adapters", "upload", "training"]],
  ["Operate", ["live", "keys", "quotas"]],
];
const SIGN_IN = () => import("./views/sign_in.js");
const NOT_ALLOWED = () => Promise.resolve({ default: MissingScope });
const NOT_SERVED = () => Promise.resolve({ default: WrongBase });

function App() {
  const { state, me, error } = useStore(session);
  if (state === "loading") return html`<main class="alone"><${Loading} /></main>`;
  if (state === "failed") {
    return html`<main class="alone"><h1>sera-serve console</h1><${ErrorNote} error=${error} retry=${begin} /></main>`;
  }
  if (state === "closed") return html`<${Lazy} load=${SIGN_IN} error=${error} /><${Notices} />`;
  return html`<${Shell} me=${me} />`;
}

function Shell({ me }) {
  const { parts } = useStore(route);
  const [isMenuOpen, setMenuOpen] = useState(false);
  const name = Object.hasOwn(VIEWS, parts[0]) ? parts[0] : "adapters";
  const view = VIEWS[name];
  const isAllowed = (each) => VIEWS[each].scope === null || may(me, VIEWS[each].scope);
  const main = useRef(null);
  const load = !isAllowed(name) ? NOT_ALLOWED : isForAnotherBase(name, me) ? NOT_SERVED : view.load;
  useEffect(() => setMenuOpen(false), [parts.join("/")]);
  const skip = (event) => {
    // The address is the view's: a link to #main would leave it.
    event.preventDefault();
    main.current.focus();
  };
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <${Connection} />
    <div class="shell">
      <div class="side">
        <header class="brand"><a href=${href(["adapters"])}><${Mark} /><span>sera-serve</span></a>
          <button type="button" class="button quiet menu-button" aria-expanded=${isMenuOpen} aria-controls="menu"
            onClick=${() => setMenuOpen(!isMenuOpen)}><${Icon} name=${isMenuOpen ? "close" : "menu"} />Menu</button>
        </header>
        <div id="menu" class=${isMenuOpen ? "menu is-open" : "menu"}>
          <nav aria-label="Views">${MENU.map(([group, names]) => {
            const allowed = names.filter(isAllowed);
            return allowed.length > 0 && html`<div class="menu-group" key=${group}>
              <h2>${group}</h2>
              <ul>${allowed.map((each) => html`<li key=${each}>
                <a href=${href([each])} aria-current=${each === name ? "page" : undefined}>
                  <${Icon} name=${each} />${VIEWS[each].title}</a></li>`)}
              </ul></div>`;
          })}</nav>
          <${Account} me=${me} />
        </div>
      </div>
      <main ref=${main} id="main" tabindex="-1">
        <${Lazy} key=${`${name} ${me.key_id}`} load=${load} me=${me}
          name=${name} scope=${view.scope} title=${view.title} />
      </main>
    </div>
    <${Notices} />`;
}

function Account({ me }) {
  return html`<section class="account" aria-label="Account">
    <p class="account-base" title="The base model of this server">${me.base.name}</p>
    ${me.needs_keys
      ? html`<p><strong>${me.tenant}</strong></p>
          <p class="account-scopes">${me.scopes.map((scope) => html`<${Badge} key=${scope}>${scope}<//>`)}</p>
          <${Button} icon="leave" kind="quiet" onClick=${signOut}>Sign out<//>`
      : html`<p class="help">This server asks for no key.</p>`}
  </section>`;
}

/** Load the code of a view, then show it. */
function Lazy({ load, title, ...rest }) {
  const [loaded, setLoaded] = useState(null);
  const [failure, setFailure] = useState(null);
  const [broken, reset] = useErrorBoundary();
  const { parts } = useStore(route);
  useEffect(() => {
    let isWanted = true;
    load().then((module) => isWanted && setLoaded({ View: module.default }), (error) => {
      const fail = (cause) => isWanted && setFailure(cause);
      // The browser does not tell whether it was the connection.
      get("/healthz").then(() => fail(error), fail);
    });
    return () => (isWanted = false);
  }, [load]);
  // A browser keeps the failure, and asks for the file again in a new page alone.
  const wasLost = failure instanceof ConnectionLost;
  useEffect(() => (wasLost ? connectionEpoch.watch(() => globalThis.location.reload()) : undefined), [wasLost]);
  const place = parts.slice(0, 3).join("/");
  const visited = useRef(null);
  useEffect(() => {
    const item = title && parts.slice(1, 3).join("/");
    document.title = [item, title ?? "Sign in", "sera-serve"].filter(Boolean).join(" - ");
    if (!loaded) return;
    // Not on the first view of the page: there the browser has put the focus where it belongs.
    if (visitedPlaces.last !== null && visitedPlaces.last !== place && visited.current !== place) {
      document.querySelector("main h1")?.focus({ preventScroll: true });
      scrollTo(0, 0);
    }
    visited.current = place;
    visitedPlaces.last = place;
  }, [loaded, place]);
  if (failure || broken) {
    const retry = () => (broken ? reset() : globalThis.location.reload());
    return html`<${ErrorNote} error=${broken ?? failure} retry=${retry} />`;
  }
  return loaded ? html`<${loaded.View} title=${title} ...${rest} />` : html`<${Loading} />`;
}

const visitedPlaces = { last: null };

function Connection() {
  const connected = useStore(isConnected);
  const wasLost = useRef(false);
  if (!connected) wasLost.current = true;
  return html`<div class="connection" role="status">
    ${!connected && html`<p><${Icon} name="warning" />No connection to the server. This page tries again by itself.</p>`}
    ${connected && wasLost.current && html`<span class="sr-only">The server is back.</span>`}
  </div>`;
}

render(html`<${App} />`, document.getElementById("app"));
begin();
