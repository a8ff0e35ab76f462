// The adapters that the key may use, with filters; and one of them.

import { html, useEffect, useLayoutEffect, useRef, useState } from "../html.js";
import { TaskBadge, Tier } from "../badges.js";
import { NO_FILTERS, SIZES, useSearch } from "../catalog.js";
import { bytes, count, counted } from "../format.js";
import { go, href, replace, route, useAddress } from "../router.js";
import { may } from "../session.js";
import { useStore } from "../store.js";
import { Button, Empty, ErrorNote, Heading, Loading, SelectField, TextField, When } from "../ui.js";
import { Adapter } from "./adapter.js";

const PAGE = 50;
const TASKS = [
  ["", "Any task"],
  ["generate", "Generate"],
  ["classify", "Classify"],
  ["regress", "Regress"],
  ["token-classify", "Find spans"],
  ["image-classify", "Classify images"],
  ["retrieve", "Retrieve"],
];

export default function Adapters({ me }) {
  const { parts } = useStore(route);
  if (parts.length >= 3) return html`<${Adapter} key=${parts.join("/")} me=${me} tenant=${parts[1]} name=${parts[2]} />`;
  return html`<${List} me=${me} />`;
}

function List({ me }) {
  const [filters, setFilters] = useState(() => filtersOf(route.value.query));
  // The browser keeps with each step of its history how far the list was when a person left it.
  const left = useRef(history.state?.list ?? null);
  const { rows, looked, isDone, error, busy, more, again } = useSearch(filters, PAGE, left.current?.rows);
  const isFiltered = Object.values(filters).some(Boolean);
  useLayoutEffect(() => replace(["adapters"], filters), [filters]);
  useAddress("adapters", (query) => setFilters(filtersOf(query)));
  useEffect(() => {
    if (left.current === null || rows.length === 0) return;
    scrollTo(0, left.current.scroll);
    left.current = null;
  }, [rows]);
  const leave = () => history.replaceState({ list: { rows: rows.length, scroll: scrollY } }, "");
  const field = (name) => ({ value: filters[name], onValue: (value) => setFilters({ ...filters, [name]: value }) });
  return html`
    <${Heading} title="Adapters" lead="Small fine-tunes of one base model. A request names one of them.">
      ${may(me, "publish") && html`<a class="button primary" href=${href(["upload"])}>Upload</a>`}
    <//>
    <form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
      <${TextField} label="Name" type="search" placeholder="tenant/name" ...${field("text")} />
      <${SelectField} label="Task" options=${TASKS} ...${field("task")} />
      <${TextField} label="Rank" inputmode="numeric" placeholder="any" size="4" ...${field("rank")} />
      <${TextField} label="Split" inputmode="numeric" placeholder="any" size="4" ...${field("split")} />
      <${SelectField} label="Size" options=${SIZES.map(([value, text]) => [value, text])} ...${field("size")} />
      ${isFiltered && html`<${Button} kind="quiet" onClick=${() => setFilters(NO_FILTERS)}>Clear<//>`}
    </form>
    <p class="result-line" role="status">
      ${busy ? "Looking..." : error && !rows.length ? "" : summary(rows, looked, isDone, isFiltered)}</p>
    <${ErrorNote} error=${error} retry=${again} />
    ${rows.length > 0
      ? html`<${Table} rows=${rows} onLeave=${leave} />`
      : busy ? html`<${Loading} rows="6" />` : !error && html`<${Nothing} me=${me} isFiltered=${isFiltered} />`}
    ${!isDone && (rows.length > 0 || !busy) && !error && html`<p class="more"><${Button} busy=${busy} onClick=${more}>
      ${rows.length && !isFiltered ? "Show more" : "Look further"}<//></p>`}`;
}

function filtersOf(query) {
  return Object.fromEntries(Object.keys(NO_FILTERS).map((name) => [name, query.get(name) ?? ""]));
}

function summary(rows, looked, isDone, isFiltered) {
  const number = counted(rows.length, "adapter");
  if (!isFiltered) return isDone ? number : `The first ${number}`;
  return `${number} of ${isDone ? "all" : "the first"} ${count(looked)}`;
}

function Table({ rows, onLeave }) {
  return html`<div class="table-box" onClickCapture=${onLeave}><table class="stacked">
    <thead><tr>
      <th scope="col">Adapter</th><th scope="col">Task</th><th scope="col">Method</th>
      <th scope="col" class="number">Rank</th><th scope="col" class="number">Split</th>
      <th scope="col" class="number">Size</th><th scope="col">Where</th><th scope="col" class="number">Version</th>
      <th scope="col">Published</th>
    </tr></thead>
    <tbody>${rows.map((row) => {
      const target = ["adapters", ...row.adapter.split("/")];
      const [tenant, name] = row.adapter.split("/");
      // Who selects a text in it stays here.
      const follow = (event) => event.target.closest("a") || !getSelection().isCollapsed || go(target);
      return html`<tr key=${row.adapter} class="clickable" onClick=${follow}>
        <th scope="row"><a href=${href(target)}><span class="tenant">${tenant}/</span>${name}</a></th>
        <td data-label="Task"><${TaskBadge} task=${row.task} /></td>
        <td data-label="Method">${row.method}</td>
        <td data-label="Rank" class="number">${row.ranks.join(", ")}</td>
        <td data-label="Split" class="number">${row.splits.join(", ")}</td>
        <td data-label="Size" class="number">${bytes(row.bytes)}</td>
        <td data-label="Where"><${Tier} ...${row} /></td>
        <td data-label="Version" class="number">${row.version}</td>
        <td data-label="Published"><${When} at=${row.created_at} /></td>
      </tr>`;
    })}</tbody>
  </table></div>`;
}

function Nothing({ me, isFiltered }) {
  if (isFiltered) return html`<${Empty} title="No adapter matches"><p>Clear a filter, or type less of the name.</p><//>`;
  return html`<${Empty} title="No adapter yet">
    ${may(me, "publish")
      ? html`<p>Upload one that is trained${may(me, "train") ? ", or train one here" : ""}.</p>
          <p class="actions"><a class="button primary" href=${href(["upload"])}>Upload</a>
          ${may(me, "train") && html`<a class="button plain" href=${href(["training"])}>Train</a>`}</p>`
      : html`<p>Nobody has published an adapter that your key may use.</p>`}
  <//>`;
}
