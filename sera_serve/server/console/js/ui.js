// Parts that several views use: fields, errors, dialogs, notices.

import { html, useEffect, useRef, useState } from "./html.js";
import { ConnectionLost, isAbort, UnreadableFile } from "./api.js";
import { ago, counted, full, time } from "./format.js";
import { Icon } from "./icons.js";
import { notices, notify, useStore } from "./store.js";

let nextId = 0;

/** An id for a label and its field. */
export function useId() {
  const id = useRef(null);
  if (id.current === null) id.current = `field-${(nextId += 1)}`;
  return id.current;
}

/** A view's heading. It takes the focus when a person comes to the view, so that a screen reader says where they are. */
export function Heading({ title, lead, back, beside, children }) {
  return html`<header class="heading">
    <div class="heading-text">
      ${back && html`<a class="back" href=${back.href}><${Icon} name="back" size="16" />${back.title}</a>`}
      <div class="title-line"><h1 tabindex="-1">${title}</h1>${beside}</div>
      ${lead && html`<p class="lead">${lead}</p>`}
    </div>
    ${children && html`<div class="actions">${children}</div>`}
  </header>`;
}

/**
 * A button. `icon` is drawn before its text; with `label` the text is for screen readers and the tooltip alone.
 *
 * While it is busy, pressing it does nothing, and Enter does not send its form. A disabled one would lose the focus.
 */
export function Button({ icon, label, kind = "plain", busy = false, children, ...rest }) {
  const held = busy && { "aria-disabled": true, onClick: (event) => event.preventDefault() };
  return html`<button type="button" class=${`button ${kind}${label ? " icon-only" : ""}`} aria-busy=${busy}
    aria-label=${label} title=${label} ...${rest} ...${held}>
    ${busy ? html`<span class="spinner" aria-hidden="true"></span>` : icon && html`<${Icon} name=${icon} />`}
    ${children}
  </button>`;
}

/** A label with its field. `children` is a function of the field's id. */
export function Field({ label, help, wide = false, children }) {
  const id = useId();
  return html`<div class=${wide ? "field wide" : "field"}>
    <label for=${id}>${label}</label>
    ${children(id, help ? `${id}-help` : undefined)}
    ${help && html`<p class="help" id=${`${id}-help`}>${help}</p>`}
  </div>`;
}

/** A one-line text field. `onValue` gets the text. */
export function TextField({ label, help, value, onValue, wide, ...rest }) {
  return html`<${Field} label=${label} help=${help} wide=${wide}>
    ${(id, described) => html`<input id=${id} aria-describedby=${described} value=${value}
      onInput=${(event) => onValue(event.currentTarget.value)} autocomplete="off" spellcheck=${false} ...${rest} />`}
  <//>`;
}

/** A choice of one among a few. `options` are [value, text]. */
export function SelectField({ label, help, value, options, onValue, ...rest }) {
  return html`<${Field} label=${label} help=${help}>
    ${(id, described) => html`<select id=${id} aria-describedby=${described} value=${value}
      onChange=${(event) => onValue(event.currentTarget.value)} ...${rest}>
      ${options.map(([option, text]) => html`<option key=${option} value=${option} selected=${option === value}>
        ${text}</option>`)}
    </select>`}
  <//>`;
}

/** A box to tick. */
export function Check({ checked, onValue, children, ...rest }) {
  return html`<label class="check">
    <input type="checkbox" checked=${checked} onChange=${(event) => onValue(event.currentTarget.checked)} ...${rest} />
    <span>${children}</span>
  </label>`;
}

/** A choice of one among two or three that are all in sight. */
export function Segments({ label, value, options, onValue }) {
  const name = useId();
  return html`<fieldset class="segments">
    <legend class="sr-only">${label}</legend>
    ${options.map(([option, text]) => html`<label key=${option}>
      <input type="radio" name=${name} checked=${option === value} onChange=${() => onValue(option)} />
      <span>${text}</span>
    </label>`)}
  </fieldset>`;
}

// By the code, where it says more than the status does.
const CODES = {
  overloaded: "The server is busy",
  quota_exceeded: "The quota allows no more",
  store_corrupted: "Damaged in the store",
};
const TITLES = {
  // A failure in a stream that has begun has no status of its own.
  200: "The answer broke off",
  401: "The key was not accepted",
  403: "Not allowed",
  404: "Not found",
  409: "Not possible now",
  413: "Too large",
  429: "Too many requests",
  503: "The server cannot do it now",
  504: "It took too long",
  507: "The server could not store it",
};

function titleOf(error) {
  if (error instanceof ConnectionLost) return "No connection";
  if (error instanceof UnreadableFile) return "The file cannot be read";
  // The first key was made while this page was used without one.
  if (error.status === 401 && error.isWithoutKey) return "The server needs a key now";
  const title = CODES[error.code] ?? TITLES[error.status];
  if (title) return title;
  if (error.status >= 500) return "The server failed";
  return error.status ? "The server refused this" : "This page failed";
}

/** A failure in words: what, why and what to do, the field at fault, and the request's id for the operator. */
export function ErrorNote({ error, title, retry }) {
  if (!error || isAbort(error)) return null;
  const facts = [
    error.param && ["field", error.param],
    error.code && ["code", error.code],
    error.requestId && ["request", error.requestId],
  ].filter(Boolean);
  return html`<div class="note danger" role="alert">
    <${Icon} name="warning" />
    <div>
      <strong>${title ?? titleOf(error)}</strong>
      <p class="message">${sentence(error.message)}</p>
      ${error.retryAfter && html`<p>Try again in ${counted(error.retryAfter, "second")}.</p>`}
      ${facts.length > 0 && html`<dl class="facts-line">
        ${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd><code>${value}</code></dd></div>`)}
      </dl>`}
      ${retry && !(error instanceof ConnectionLost) && html`<${Button} onClick=${retry}>Try again<//>`}
    </div>
  </div>`;
}

/** A message of the server as a sentence. A field's name that it begins with stays as the server writes it. */
function sentence(text) {
  const ended = /[.!?]$/.test(text) ? text : `${text}.`;
  return ended.replace(/^[a-z](?=[a-z]*[\s,;:'])/, (letter) => letter.toUpperCase());
}

/** What a view shows when its key may not use it. */
export function MissingScope({ me, scope, title }) {
  return html`<${Heading} title=${title} /><div class="empty">
    <h2>This needs the scope <code>${scope}</code></h2>
    <p>Your key has ${me.scopes.length ? me.scopes.join(", ") : "no scope"}. This view needs a key with <code>${scope}</code>:
      ask the operator of this server for one, then sign out and use it.</p>
  </div>`;
}

/** What a list shows when it is empty. */
export function Empty({ title, children }) {
  return html`<div class="empty"><h2>${title}</h2>${children}</div>`;
}

/** Grey lines where a list will be, of the list's height. */
export function Loading({ rows = 4, what = "Loading" }) {
  return html`<div class="loading" role="status"><span class="sr-only">${what}</span>
    ${Array.from({ length: rows }, (_, index) => html`<div key=${index} class="bone"></div>`)}
  </div>`;
}

/** A short word in a box: a task, a state. */
export function Badge({ tone = "plain", children }) {
  return html`<span class=${`badge ${tone}`}>${children}</span>`;
}

/** A time as people say it, with the time in full behind it. */
export function When({ at }) {
  return html`<time datetime=${time(at).toISOString()} title=${full(at)}>${ago(at)}</time>`;
}

/** Runs `action` at Ctrl+Enter, for a view's `onKeyDown`. */
export const onCtrlEnter = (action) => (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  action();
};

/** Copies a text, and says so. */
export function CopyButton({ text, what = "Copy", ...rest }) {
  const [done, setDone] = useState(false);
  useEffect(() => {
    if (!done) return undefined;
    const timer = setTimeout(() => setDone(false), 2000);
    return () => clearTimeout(timer);
  }, [done]);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setDone(true);
      notify("Copied.");
    } catch {
      notify("The browser does not let this page copy: select the text and copy it.");
    }
  };
  return html`<${Button} icon=${done ? "check" : "copy"} label=${what} kind="quiet" onClick=${copy} ...${rest} />`;
}

/** Where `notify` writes. */
export function Notices() {
  const shown = useStore(notices);
  return html`<div class="notices" role="status">
    ${shown.map(({ id, text }) => html`<p key=${id}>${text}</p>`)}
  </div>`;
}

/**
 * A dialog over the page. The browser keeps the focus inside; Escape calls `onClose`; the focus then goes back.
 *
 * A form in it is sent by Enter: `onSubmit`.
 */
export function Dialog({ title, onClose, onSubmit, children, footer, wide = false }) {
  const element = useRef(null);
  const id = useId();
  useEffect(() => {
    const opener = document.activeElement;
    const dialog = element.current;
    dialog.showModal();
    // The first field, or what is marked: in a dialog that deletes, the way out.
    const first = dialog.querySelector("[data-first], .dialog-body input, .dialog-body select, .dialog-body textarea");
    (first ?? dialog.querySelector("button")).focus();
    return () => {
      // While it is open, nothing else can have the focus.
      dialog.close();
      if (opener?.isConnected) opener.focus();
    };
  }, []);
  const submit = (event) => {
    event.preventDefault();
    onSubmit?.();
  };
  return html`<dialog ref=${element} class=${wide ? "wide" : ""} aria-labelledby=${id}
    onCancel=${(event) => { event.preventDefault(); onClose(); }}>
    <form onSubmit=${submit} novalidate>
      <header><h2 id=${id}>${title}</h2><${Button} icon="close" label="Close" kind="quiet" onClick=${onClose} /></header>
      <div class="dialog-body">${children}</div>
      <footer>${footer}</footer>
    </form>
  </dialog>`;
}

/** A question before something that cannot be undone. `action` is a `useAction`. */
export function Confirm({ title, verb, wayOut = "Cancel", danger = true, action, onClose, onDone, children }) {
  const confirm = async () => {
    if (await action.run()) onDone();
  };
  return html`<${Dialog} title=${title} onClose=${onClose} onSubmit=${confirm} footer=${html`
      <${Button} data-first="" onClick=${onClose}>${wayOut}<//>
      <${Button} type="submit" kind=${danger ? "danger" : "primary"} busy=${action.busy}>${verb}<//>`}>
    ${children}
    <${ErrorNote} error=${action.error} />
  <//>`;
}

/** A bar that is filled up to `share` of 1. Without a label it is for the eye alone: a text beside it says the same. */
export function Meter({ share, tone = "accent", label }) {
  const width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return html`<span class="meter" role=${label && "img"} aria-label=${label} aria-hidden=${!label}><span class=${tone} style=${{ width }}></span></span>`;
}
