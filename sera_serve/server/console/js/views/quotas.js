// How much each tenant may use, and uses. Without the scope admin: the key's own tenant alone, to read.

import { html, useState } from "../html.js";
import { get, path, send } from "../api.js";
import { bytes, count, numberOr, partOf } from "../format.js";
import { may } from "../session.js";
import { notify, useAction, useDialog, useLoad } from "../store.js";
import { Button, Dialog, Empty, ErrorNote, Heading, Loading, Meter, SelectField, TextField } from "../ui.js";

// Field of the limit, its name, the field of its use.
const LIMITS = [
  ["adapters", "Adapters", "adapters"],
  ["bytes", "Bytes of adapters", "bytes"],
  ["requests_per_minute", "Requests a minute", "requests_this_minute"],
  ["tokens_per_minute", "Tokens a minute", "tokens_this_minute"],
  ["requests_in_flight", "Requests in flight", "requests_in_flight"],
  ["training_jobs", "Training jobs", "training_jobs"],
];
// The limits of every tenant that has none of its own. Nobody uses them as this tenant.
const OTHERS = "*";
// A page of thousands of cards makes each key that is typed slow.
const SHOWN = 60;
const PRIORITIES = [["low", "low"], ["normal", "normal"], ["high", "high"]];

export default function Quotas({ me }) {
  const isAdmin = may(me, "admin");
  const load = (signal) => (isAdmin ? get("/v1/quotas", {}, signal) : own(me, signal));
  const { data, error, loading, reload } = useLoad(load, [isAdmin]);
  const [edited, setEdited, close] = useDialog();
  const [tenant, setTenant] = useState("");
  const [shown, setShown] = useState(SHOWN);
  const all = data?.quotas ?? [];
  const found = all.filter((quota) => named(quota.tenant).includes(tenant.trim().toLowerCase()));
  const done = (text) => {
    notify(text);
    close();
    reload();
  };
  return html`
    <${Heading} title="Quotas" lead="What a tenant may use, and what it uses now.">
      <${Button} kind="quiet" busy=${loading && data !== null} onClick=${reload}>Refresh<//>
      ${isAdmin && html`<${Button} kind="primary" icon="plus" onClick=${() => setEdited({ tenant: "", limits: {} })}>Set a quota<//>`}
    <//>
    ${isAdmin && html`<div class="filters"><${TextField} label="Tenant" type="search" value=${tenant} onValue=${setTenant}
      placeholder="all tenants" /></div>`}
    <${ErrorNote} error=${error} retry=${reload} />
    ${!data && loading && html`<${Loading} />`}
    ${data?.quotas.length === 0 && html`<${Empty} title="No tenant has a quota"><p>Then nothing but the server's own limits hold.</p><//>`}
    ${isAdmin && all.length > 0 && html`<p class="result-line" role="status">${partOf(found.length, shown, "quota", "first")}</p>`}
    <div class="quota-grid">${found.slice(0, shown).map((quota) => html`<section class="card quota" key=${quota.tenant}
        aria-label=${`Quota of ${named(quota.tenant)}`}>
      <header><h2>${named(quota.tenant)}</h2>
        ${isAdmin && html`<${Button} kind="quiet" aria-label=${`Change the quota of ${named(quota.tenant)}`} onClick=${() => setEdited(quota)}>Change<//>`}</header>
      ${LIMITS.map(([field, name, used]) => html`<${Line} key=${field} name=${name} limit=${quota.limits[field]} used=${quota.tenant === OTHERS ? null : quota.usage[used]}
        format=${field === "bytes" ? bytes : count} />`)}
      <p class="help">Highest priority: ${quota.limits.max_priority ?? "no limit"}</p>
    </section>`)}</div>
    ${found.length > shown && html`<p class="more"><${Button} onClick=${() => setShown(shown + SHOWN)}>Show more<//></p>`}
    ${edited && html`<${EditDialog} quota=${edited} onClose=${close} onDone=${done} />`}`;
}

const named = (tenant) => (tenant === OTHERS ? "every other tenant" : tenant);

async function own(me, signal) {
  return { quotas: [await get(path`/v1/quotas/${me.tenant}`, {}, signal)] };
}

function Line({ name, limit, used, format }) {
  const hasLimit = limit !== null;
  if (used === null) {
    return html`<div class="memory-row"><p><span>${name}</span><span class="muted">${hasLimit ? format(limit) : "no limit"}</span></p></div>`;
  }
  const share = hasLimit && limit > 0 ? used / limit : Number(hasLimit);
  return html`<div class="memory-row">
    <p><span>${name}</span><span class="muted">${format(used)} ${hasLimit ? `of ${format(limit)}` : "(no limit)"}</span></p>
    ${hasLimit && html`<${Meter} share=${share} tone=${share >= 1 ? "danger" : share > 0.8 ? "warn" : "accent"} />`}
  </div>`;
}

function EditDialog({ quota, onClose, onDone }) {
  const isNew = quota.tenant === "";
  const [tenant, setTenant] = useState(quota.tenant);
  const [limits, setLimits] = useState(() => texts(quota.limits));
  const before = texts(quota.limits);
  const changed = Object.entries(limits).filter(([field, text]) => text.trim() !== before[field]);
  const canSave = tenant.trim() !== "" && changed.length > 0;
  const action = useAction(async () => {
    await send("PUT", path`/v1/quotas/${tenant.trim()}`, Object.fromEntries(changed.map(([field, text]) => [field, valueOf(field, text)])));
    onDone(`The quota of ${named(tenant.trim())} is set.`);
  });
  const clearing = useAction(async () => {
    await send("DELETE", path`/v1/quotas/${quota.tenant}`);
    onDone(`The settings' limits hold again for ${named(quota.tenant)}.`);
  });
  const field = (name) => ({ value: limits[name], onValue: (value) => setLimits({ ...limits, [name]: value }) });
  return html`<${Dialog} wide title=${isNew ? "Set a quota" : `Quota of ${named(quota.tenant)}`} onClose=${onClose}
    onSubmit=${() => canSave && action.run()} footer=${html`
      ${!isNew && html`<${Button} kind="quiet danger-text" busy=${clearing.busy} onClick=${() => clearing.run()}>Take back<//>`}
      <${Button} onClick=${onClose}>Cancel<//>
      <${Button} kind="primary" type="submit" busy=${action.busy} disabled=${!canSave}>Save<//>`}>
    ${isNew && html`<${TextField} label="Tenant" value=${tenant} onValue=${setTenant} placeholder="acme" help="* is every other tenant." />`}
    <p class="help">${isNew ? "What is left empty stays as it is." : "An empty field is no limit. Take back: the limits of the settings file hold again."}</p>
    <div class="fields-2">
      ${LIMITS.map(([name, title]) => html`<${TextField} key=${name} label=${title} inputmode="numeric" ...${field(name)} />`)}
      <${SelectField} label="Highest priority" options=${[["", isNew ? "As it is" : "No limit"], ...PRIORITIES]} ...${field("max_priority")} />
    </div>
    <${ErrorNote} error=${action.error} />
    <${ErrorNote} error=${clearing.error} />
  <//>`;
}

function texts(limits) {
  return Object.fromEntries([...LIMITS.map(([field]) => field), "max_priority"].map((field) => [field, String(limits[field] ?? "")]));
}

/** What the API takes: null for no limit. */
function valueOf(field, text) {
  if (text.trim() === "") return null;
  return field === "max_priority" ? text : numberOr(text.trim());
}
