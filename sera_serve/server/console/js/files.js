// Choosing files, by dropping them or with the browser's own dialog, and uploading them.

import { UnreadableFile, upload } from "./api.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { bytes } from "./format.js";
import { Icon } from "./icons.js";
import { session } from "./session.js";
import { notify, Store } from "./store.js";
import { Button, useId } from "./ui.js";

const NOTHING = { files: [], progress: null, error: null, answer: null };

/**
 * A form's files and their upload: `{files, progress, error, answer}`. `progress` is null, but while it goes on.
 *
 * It outlives its view: a person who comes back, or signs in again, finds what was chosen, how far it is, and its end.
 */
export class Upload extends Store {
  #url;
  #stopper = null;

  constructor(url) {
    super(NOTHING);
    this.#url = url;
  }

  /** Take other files in place of those that are there. */
  choose(files) {
    this.set({ ...NOTHING, files });
  }

  /** Send a form with a file of `total` bytes. Resolves to the answer, or to null after a failure. */
  async send(form, total) {
    this.#stopper = new AbortController();
    this.#change({ error: null, answer: null, progress: { sent: 0, total } });
    try {
      const onProgress = (sent, all) => this.#change({ progress: { sent, total: all } });
      const answer = await upload(this.#url, form, { onProgress, signal: this.#stopper.signal });
      this.#change({ answer, progress: null });
      return answer;
    } catch (error) {
      if (error instanceof UnreadableFile) this.choose([]);
      // Where a person signs in, the page says what is wrong with the key.
      const isTold = error.status === 401 && session.value.state === "closed";
      this.#change({ error: isTold ? null : error, progress: null });
      return null;
    }
  }

  /** Stop the upload. */
  stop() {
    this.#stopper.abort();
  }

  /** The view goes: what it has said is over. */
  leave() {
    if (this.value.answer !== null) this.choose([]);
    else this.#change({ error: null });
  }

  #change(part) {
    this.set({ ...this.value, ...part });
  }
}

/**
 * A place to drop files on. The input below it is an ordinary one, so that a keyboard and a screen reader use it.
 *
 * `onFiles` gets all files that were dropped or chosen: it is the view that says which ones it does not take.
 */
export function DropZone({ label, help, accept, multiple = false, files, onFiles, disabled = false }) {
  const id = useId();
  const [isOver, setOver] = useState(false);
  const depth = useRef(0);
  const input = useRef(null);
  useEffect(() => {
    // The input tells the names of its files, too. Where it keeps none, the same file may be chosen again.
    const shown = new DataTransfer();
    for (const file of files) shown.items.add(file);
    input.current.files = shown.files;
  }, [files]);
  useEffect(() => {
    // Beside the place, the browser would leave the page and open the file.
    const keep = (event) => event.dataTransfer.types.includes("Files") && event.preventDefault();
    addEventListener("dragover", keep);
    addEventListener("drop", keep);
    return () => {
      removeEventListener("dragover", keep);
      removeEventListener("drop", keep);
    };
  }, []);
  const enter = (event) => {
    event.preventDefault();
    depth.current += 1;
    setOver(true);
  };
  const leave = () => {
    depth.current -= 1;
    if (depth.current === 0) setOver(false);
  };
  const drop = (event) => {
    event.preventDefault();
    depth.current = 0;
    setOver(false);
    const dropped = event.dataTransfer.files;
    if (disabled || dropped.length === 0) return;
    onFiles([...dropped]);
  };
  return html`<div class=${isOver ? "drop is-over" : "drop"} onDragEnter=${enter} onDragLeave=${leave}
    onDragOver=${(event) => event.preventDefault()} onDrop=${drop}>
    <${Icon} name="upload" size="28" />
    <label for=${id}>${label}</label>
    <p class="help" id=${`${id}-help`}>${help}</p>
    <input ref=${input} type="file" id=${id} accept=${accept} multiple=${multiple} disabled=${disabled} aria-describedby=${`${id}-help`}
      onChange=${(event) => onFiles([...event.currentTarget.files])} />
    ${files.length > 0 && html`<ul class="chosen">${files.map((file) => html`<li key=${file.name}>
      <strong>${file.name}</strong> <span class="muted">${bytes(file.size)}</span></li>`)}</ul>`}
  </div>`;
}

/** How far an upload is. A screen reader is told its end, not each part. */
export function Progress({ sent, total, what }) {
  const share = total ? sent / total : 0;
  const isSent = share >= 1;
  return html`<div class="progress">
    <progress max="1" value=${isSent ? undefined : share} aria-label=${what}></progress>
    <p>${!isSent && `${bytes(sent)} of ${bytes(total)}`}<span role="status">${isSent && "Received. The server checks it."}</span></p>
  </div>`;
}

/** The button of a form that stops its upload. */
export function StopUpload({ upload: sending, sent, total }) {
  const stop = (event) => {
    // The button goes now, and would take the focus with it.
    event.currentTarget.form.querySelector("[type=submit]").focus();
    sending.stop();
    notify(sent < total ? "Stopped: the server keeps nothing of it." : "Stopped after the server had all of it: look whether it is there.");
  };
  return html`<${Button} onClick=${stop}>Stop<//>`;
}
