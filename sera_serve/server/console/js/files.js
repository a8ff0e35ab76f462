// Choosing files: by dropping them, or with the browser's own dialog.

import { html, useRef, useState } from "./html.js";
import { bytes } from "./format.js";
import { Icon } from "./icons.js";
import { useId } from "./ui.js";

/** A place to drop files on. The input below it is an ordinary one, so that a keyboard and a screen reader use it. */
export function DropZone({ label, help, accept, multiple = false, files, onFiles, disabled = false }) {
  const id = useId();
  const [isOver, setOver] = useState(false);
  const depth = useRef(0);
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
    if (!disabled) onFiles([...event.dataTransfer.files].slice(0, multiple ? 2 : 1));
  };
  return html`<div class=${isOver ? "drop is-over" : "drop"} onDragEnter=${enter} onDragLeave=${leave}
    onDragOver=${(event) => event.preventDefault()} onDrop=${drop}>
    <${Icon} name="upload" size="28" />
    <label for=${id}>${label}</label>
    <p class="help" id=${`${id}-help`}>${help}</p>
    <input type="file" id=${id} accept=${accept} multiple=${multiple} disabled=${disabled} aria-describedby=${`${id}-help`}
      onChange=${(event) => onFiles([...event.currentTarget.files].slice(0, multiple ? 2 : 1))} />
    ${files.length > 0 && html`<ul class="chosen">${files.map((file) => html`<li key=${file.name}>
      <strong>${file.name}</strong> <span class="muted">${bytes(file.size)}</span></li>`)}</ul>`}
  </div>`;
}

/** How far an upload is. */
export function Progress({ sent, total, what }) {
  const share = total ? sent / total : 0;
  const text = share >= 1 ? "Received. The server checks it." : `${bytes(sent)} of ${bytes(total)}`;
  return html`<div class="progress">
    <progress max="1" value=${share >= 1 ? undefined : share} aria-label=${what}></progress>
    <p role="status">${text}</p>
  </div>`;
}
