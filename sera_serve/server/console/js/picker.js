// Choosing adapters by name: a field with a list of what matches, and the chosen ones beside it.

import { NO_FILTERS, matches, useSearch } from "./catalog.js";
import { html, useLayoutEffect, useRef, useState } from "./html.js";
import { Icon } from "./icons.js";
import { replace, route, useAddress } from "./router.js";
import { useId } from "./ui.js";

const SHOWN = 8;

/**
 * The adapters that a view has chosen, as a state. They are in its address, and in `kept.adapters` when the address names
 * none. `most()` is how many an address may name.
 */
export function useChosen(view, kept, most) {
  const named = () => [...new Set(route.value.query.getAll("adapter"))].slice(0, most());
  // A list of its own: the address is then written again.
  const chosen = () => (named().length > 0 ? named() : [...kept.adapters]);
  const [adapters, setAdapters] = useState(chosen);
  useLayoutEffect(() => replace([view], { adapter: adapters }), [adapters]);
  useAddress(view, () => setAdapters(chosen()));
  return [adapters, setAdapters];
}

/**
 * Pick adapters of a task. `chosen` are names; `onChosen` gets the new list.
 *
 * A name may be typed in full with @alias, @v3 or @digest: Enter takes it as it is.
 */
export function AdapterPicker({ label, task, chosen, onChosen, most, colours }) {
  const id = useId();
  const [text, setText] = useState("");
  const [isOpen, setOpen] = useState(false);
  const [active, setActive] = useState(0);
  const input = useRef(null);
  const isFull = chosen.length >= most;
  return html`<div class="field picker">
    <label for=${id}>${label}</label>
    <div class="chips">
      ${chosen.map((name, index) => html`<span class="chip" key=${name} style=${{ "--lane": colours?.[index] }}>
        ${colours && html`<span class="dot"></span>`}${name}
        <button type="button" aria-label=${`Remove ${name}`} onClick=${() => {
          onChosen(chosen.filter((each) => each !== name));
          input.current?.focus();
        }}><${Icon} name="close" size="14" /></button>
      </span>`)}
      <div class="combo">
        <input ref=${input} id=${id} role="combobox" aria-expanded=${isOpen} aria-controls=${`${id}-list`}
          aria-autocomplete="list" aria-activedescendant=${isOpen ? `${id}-${active}` : undefined}
          value=${text} disabled=${isFull} autocomplete="off" spellcheck=${false}
          placeholder=${isFull ? `${most} at most` : "Add an adapter"}
          onBlur=${() => setOpen(false)} onClick=${() => setOpen(true)}
          onKeyDown=${(event) => event.key === "ArrowDown" && setOpen(true)}
          onInput=${(event) => { setText(event.currentTarget.value); setOpen(true); setActive(0); }} />
        ${isOpen && !isFull && html`<${Options} id=${id} input=${input} text=${text} task=${task} chosen=${chosen}
          active=${active} setActive=${setActive} close=${() => setOpen(false)} pick=${(name) => {
            onChosen([...chosen, name]);
            setText("");
            setActive(0);
            setOpen(false);
          }} />`}
      </div>
    </div>
  </div>`;
}

function Options({ id, input, text, task, chosen, active, setActive, close, pick }) {
  const list = useRef(null);
  const filters = { ...NO_FILTERS, text: text.split("@")[0], task };
  const { rows, error, busy, isDone } = useSearch(filters, SHOWN);
  // While a search is under way, the rows are those of the text before: Enter would take another adapter than was typed.
  const found = rows.filter((row) => matches(row, filters)).map((row) => row.adapter);
  const names = found.filter((name) => !chosen.includes(name)).slice(0, SHOWN);
  if (text.includes("@") && !chosen.includes(text.trim())) names.unshift(text.trim());
  // The keys are the field's, but what they do depends on the list: on the one of this text, before the next key comes.
  useLayoutEffect(() => {
    const field = input.current;
    const onKey = (event) => {
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        event.preventDefault();
        if (names.length === 0) return;
        const next = (active + (event.key === "ArrowDown" ? 1 : names.length - 1)) % names.length;
        setActive(next);
        // Long names make the list longer than its box.
        list.current.children[next].scrollIntoView({ block: "nearest" });
      } else if (event.key === "Enter" && !event.ctrlKey && !event.metaKey && names[active]) {
        event.preventDefault();
        pick(names[active]);
      } else if (event.key === "Escape") {
        event.preventDefault();
        event.stopPropagation();
        close();
      }
    };
    field.addEventListener("keydown", onKey);
    return () => field.removeEventListener("keydown", onKey);
  });
  return html`<ul ref=${list} class="options" id=${`${id}-list`} role="listbox" aria-label="Adapters"
    onMouseDown=${(event) => event.preventDefault()}>
    ${names.map((name, index) => html`<li key=${name} id=${`${id}-${index}`} role="option"
      aria-selected=${index === active} onClick=${() => pick(name)}
      onMouseEnter=${() => setActive(index)}>${name}</li>`)}
    ${names.length === 0 && html`<li class="options-note" role="option" aria-disabled="true" aria-selected="false">
      ${error ? error.message : busy ? "Looking..." : isDone ? "No adapter matches." : "None so far: type more of its name."}
    </li>`}
  </ul>`;
}
