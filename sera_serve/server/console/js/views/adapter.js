// One adapter: its facts, its versions with their metrics, its aliases, who else may use it.

import { html, useState } from "../html.js";
import { get, path, send } from "../api.js";
import { TaskBadge, Tier, viewOf } from "../badges.js";
import { bytes, count, figure, short } from "../format.js";
import { goOn, href } from "../router.js";
import { may, mayChange } from "../session.js";
import { notify, useAction, useDialog, useLoad, usePages } from "../store.js";
import { Button, Confirm, CopyButton, Dialog, ErrorNote, Heading, Loading, SelectField, TextField, When } from "../ui.js";

const METRICS_SHOWN = 6;
const VERSIONS_SHOWN = 100;

export function Adapter({ me, tenant, name }) {
  const id = `${tenant}/${name}`;
  const url = path`/v1/adapters/${tenant}/${name}`;
  const detail = useLoad((signal) => get(url, {}, signal), [url]);
  const history = usePages(async (before, signal) => {
    const page = await get(`${url}/versions`, { limit: VERSIONS_SHOWN, before }, signal);
    return { ...page, rows: page.versions };
  }, [url], VERSIONS_SHOWN);
  const [dialog, setDialog, close] = useDialog();
  const canChange = mayChange(me, id);
  const info = detail.data;
  const isDamaged = detail.error?.code === "store_corrupted";
  // Of all tenants, so for an admin alone.
  const traffic = useLoad(async (signal) => (may(me, "admin") ? (await get("/v1/stats", {}, signal)).by_adapter[id] : null), [id]);
  const reload = () => {
    detail.reload();
    history.reload();
    traffic.reload();
  };
  const changed = (text) => {
    notify(text);
    close();
    reload();
  };
  const pin = useAction(async (isPinned) => {
    const pinned = await send(isPinned ? "PUT" : "DELETE", `${url}/pin`);
    changed(isPinned ? `Version ${pinned.version} stays on the device.` : `Version ${pinned.version} may leave the device.`);
  });
  const tryIt = info && viewOf(info.task);
  return html`
    <${Heading} title=${html`<span class="tenant">${tenant}/</span>${name}`} back=${{ href: href(["adapters"]), title: "Adapters" }}
      beside=${html`<${CopyButton} text=${id} what="Copy the name" />`}>
      ${info && html`
        ${tryIt && html`<a class="button primary" href=${href([tryIt], { adapter: id })}>${tryIt === "classify" ? "Classify with it" : "Try it"}</a>`}
        ${canChange && html`
          <${Button} icon="pin" busy=${pin.busy} onClick=${() => pin.run(!info.pinned)}
            title=${info.pinned ? "Let it leave the device" : "Keep it on the device: it always answers at once"}>
            ${info.pinned ? "Unpin" : "Pin"}<//>`}`}
      ${canChange && (info || isDamaged) && html`<${Button} icon="trash" kind="quiet danger-text"
        onClick=${() => setDialog({ kind: "delete" })}>Delete<//>`}
    <//>
    <${ErrorNote} error=${detail.error ?? traffic.error} retry=${reload} />
    ${isDamaged && html`<p class="help">What the store holds of it cannot be read: no list has it, and no request gets it. It
      answers again when the operator has brought its files back. ${canChange && "It can be deleted."}</p>`}
    <${ErrorNote} error=${pin.error} />
    ${info ? html`<${Facts} info=${info} traffic=${traffic.data} />` : detail.loading && html`<${Loading} rows="3" />`}
    <${Versions} history=${history} canChange=${canChange} id=${id} task=${info?.task} onDialog=${setDialog}
      isTold=${detail.error !== null && !info} />
    ${canChange && info && html`<${Shares} url=${url} tenant=${tenant} />`}
    ${dialog?.kind === "delete" && html`<${DeleteDialog} url=${url} id=${id} version=${dialog.version} onClose=${close}
      onDone=${() => {
        if (dialog.version !== undefined) return changed(`Version ${dialog.version} is deleted.`);
        notify(`${id} is deleted.`);
        return goOn(["adapters", tenant, name], ["adapters"]);
      }} />`}
    ${dialog?.kind === "alias" && html`<${AliasDialog} url=${url} id=${id} version=${dialog.version} alias=${dialog.alias}
      aliases=${history.data.aliases} onClose=${close} onDone=${changed} />`}
    ${dialog?.kind === "remove-alias" && html`<${RemoveAliasDialog} url=${url} id=${id} alias=${dialog.alias}
      onClose=${close} onDone=${changed} />`}`;
}

function Facts({ info, traffic }) {
  const facts = [
    ["Task", html`<${TaskBadge} task=${info.task} />`],
    ["Where", html`<${Tier} ...${info} />`],
    ["Method", info.method],
    ["Rank", info.ranks.join(", ")],
    ["Split", info.splits.join(", ")],
    ["Layers", count(info.modules)],
    ["Parameters", count(info.parameters)],
    ["Size", bytes(info.bytes)],
    ["Base", info.base],
    ["Digest", html`<code title=${info.digest}>${info.digest.slice(0, 12)}</code>`],
    info.labels && ["Labels", info.labels.slice(0, 12).join(", ") + (info.labels.length > 12 ? ` and ${info.labels.length - 12} more` : "")],
    traffic && ["Since the start", trafficText(traffic)],
    info.has_chat_template && ["Chat", "has its own template"],
  ].filter(Boolean);
  return html`<section class="card" aria-label="Facts">
    <dl class="facts">${facts.map(([term, value]) => html`<div key=${term}><dt>${term}</dt><dd>${value}</dd></div>`)}</dl>
  </section>`;
}

function trafficText({ requests, tokens, classified_inputs: inputs }) {
  const work = [tokens > 0 && `${short(tokens)} tokens`, inputs > 0 && `${short(inputs)} inputs`].filter(Boolean);
  return [`${short(requests)} ${requests === 1 ? "request" : "requests"}`, ...work].join(", ");
}

function Versions(props) {
  const { data, error, loading, reload } = props.history;
  // The section is there from the beginning. One that takes the place of another element while `Shares` stands behind it
  // lets Preact put `Shares` at the top of the page.
  return html`<section aria-labelledby="versions-title" hidden=${props.isTold}>
    <h2 id="versions-title">Versions</h2>
    <${ErrorNote} error=${props.isTold ? null : error} retry=${reload} />
    ${data && html`<${VersionList} ...${props} />`}
    ${!data && loading && html`<${Loading} />`}
  </section>`;
}

function VersionList({ history, canChange, id, task, onDialog }) {
  const { data, loading, hasMore, more } = history;
  const aliasesOf = (version) => Object.entries(data.aliases).filter(([, at]) => at === version).map(([alias]) => alias);
  const newest = data.rows[0]?.version;
  const served = data.aliases.latest ?? newest;
  return html`
    <p class="help">A request for <code>${id}</code> gets version ${served}: <code>latest</code> points to it.</p>
    <ol class="versions" reversed>
      ${data.rows.map((version) => {
        const aliases = aliasesOf(version.version);
        return html`<li key=${version.version} class=${version.version === served ? "card is-served" : "card"}>
          <div class="version-head">
            <h3>Version ${version.version}</h3>
            ${aliases.map((alias) => html`<span class="alias" key=${alias}>${alias}
              ${canChange && alias !== "latest" && html`<button type="button" aria-label=${`Remove alias ${alias}`}
                onClick=${() => onDialog({ kind: "remove-alias", alias })}>×</button>`}</span>`)}
            <${When} at=${version.created_at} />
          </div>
          ${version.description && html`<p>${version.description}</p>`}
          <p class="version-facts muted">${version.method}, rank ${version.ranks.join(", ")}, split ${version.splits.join(", ")},
            ${" "}${count(version.parameters)} parameters, ${bytes(version.bytes)},
            ${" "}<code title=${version.digest}>${version.digest.slice(0, 8)}</code></p>
          <${Metrics} metrics=${version.metrics} />
          <${RunCard} card=${version.card} />
          <div class="actions">
            ${task && viewOf(task) && html`<a class="button quiet" href=${href([viewOf(task)], { adapter: `${id}@v${version.version}` })}>Try this version</a>`}
            ${canChange && version.version !== served && html`<${Button} kind="plain"
              onClick=${() => onDialog({ kind: "alias", version: version.version, alias: "latest" })}>
              ${version.version < served ? "Roll back to this" : "Serve this"}<//>`}
            ${canChange && html`<${Button} kind="quiet" onClick=${() => onDialog({ kind: "alias", version: version.version })}>Set alias<//>`}
            ${canChange && data.rows.length > 1 && html`<${Button} kind="quiet danger-text" icon="trash"
              label=${`Delete version ${version.version}`} onClick=${() => onDialog({ kind: "delete", version: version.version })} />`}
          </div>
        </li>`;
      })}
    </ol>
    ${hasMore && html`<p class="more"><${Button} busy=${loading} onClick=${more}>Show older versions<//></p>`}`;
}

function Metrics({ metrics }) {
  const entries = Object.entries(metrics ?? {}).slice(0, METRICS_SHOWN);
  if (entries.length === 0) return null;
  return html`<dl class="metrics">${entries.map(([name, value]) => html`<div key=${name}>
    <dt>${name.replaceAll("_", " ")}</dt><dd>${figure(value)}</dd></div>`)}</dl>`;
}

// What the version's training recorded. Whoever made the adapter wrote it.
function RunCard({ card }) {
  const entries = Object.entries(card ?? {}).filter(([name]) => name !== "description" && name !== "metrics");
  if (entries.length === 0) return null;
  return html`<details class="options-box run-card"><summary>How it was trained</summary>
    <dl class="run-card-facts">${entries.map(([name, text]) => html`<div key=${name}><dt>${name}</dt><dd>${text}</dd></div>`)}</dl>
  </details>`;
}

function AliasDialog({ url, id, version, alias: given, aliases, onClose, onDone }) {
  const [alias, setAlias] = useState(given ?? "");
  const moved = Object.hasOwn(aliases, alias) && aliases[alias];
  const action = useAction(async () => {
    await send("PUT", `${url}${path`/aliases/${alias.trim()}`}`, { version });
    onDone(`${alias.trim()} now points to version ${version}.`);
  });
  const isRollback = given === "latest";
  return html`<${Dialog} title=${isRollback ? `Serve version ${version}?` : `An alias for version ${version}`} onClose=${onClose}
    onSubmit=${() => alias.trim() && action.run()} footer=${html`
      <${Button} onClick=${onClose} data-first=${isRollback ? "" : undefined}>Cancel<//>
      <${Button} kind="primary" type="submit" busy=${action.busy} disabled=${!alias.trim()}>
        ${isRollback ? "Serve it" : "Set alias"}<//>`}>
    ${isRollback
      ? html`<p>New requests for <code>${id}</code> get version ${version} instead of ${aliases.latest}. Requests under
          way keep the version that they began with.</p>`
      : html`<${TextField} label="Alias" value=${alias} onValue=${setAlias} placeholder="stable"
          help=${`Requests name it as ${id}@${alias.trim() || "stable"}.`} />
        ${moved && moved !== version && html`<p>It moves from version ${moved}.</p>`}`}
    <${ErrorNote} error=${action.error} />
  <//>`;
}

function RemoveAliasDialog({ url, id, alias, onClose, onDone }) {
  const action = useAction(() => send("DELETE", `${url}${path`/aliases/${alias}`}`));
  return html`<${Confirm} title=${`Remove the alias ${alias}?`} verb="Remove" action=${action} onClose=${onClose}
    onDone=${() => onDone(`${alias} is removed.`)}>
    <p>Requests for <code>${id}@${alias}</code> are refused from then on. The version stays.</p>
  <//>`;
}

function DeleteDialog({ url, id, version, onClose, onDone }) {
  const action = useAction(() => send("DELETE", version === undefined ? url : `${url}@v${version}`));
  const what = version === undefined ? id : `version ${version} of ${id}`;
  return html`<${Confirm} title=${`Delete ${what}?`} verb="Delete" action=${action} onClose=${onClose} onDone=${onDone}>
    <p>${version === undefined ? "All of its versions go." : "Its number is never used again."} New requests for it are
      refused. Nobody can bring it back.</p>
  <//>`;
}

function Shares({ url, tenant }) {
  const shares = useLoad((signal) => get(`${url}/shares`, {}, signal), [url]);
  const [other, setOther] = useState("");
  const [isPublic, setPublic] = useState("no");
  const change = useAction(async (method, who) => {
    await send(method, `${url}${path`/shares/${who}`}`);
    notify(method === "PUT" ? `Shared with ${named(who)}.` : `No longer shared with ${named(who)}.`);
    setOther("");
    shares.reload();
  });
  const who = isPublic === "yes" ? "*" : other.trim();
  const submit = (event) => {
    event.preventDefault();
    if (who) change.run("PUT", who);
  };
  const list = shares.data?.shared_with ?? [];
  return html`<section class="card" aria-labelledby="shares-title">
    <h2 id="shares-title">Shared with</h2>
    ${shares.data && (list.length === 0
      ? html`<p class="help">Only ${tenant} uses it. Others can use it, and never change it, once you share it.</p>`
      : html`<ul class="chips">${list.map((each) => html`<li class="chip" key=${each}>${named(each)}
          <button type="button" aria-label=${`Stop sharing with ${named(each)}`} disabled=${change.busy}
            onClick=${() => change.run("DELETE", each)}>×</button></li>`)}</ul>`)}
    <form class="inline-form" onSubmit=${submit}>
      <${SelectField} label="Who" value=${isPublic} onValue=${setPublic} options=${[["no", "One tenant"], ["yes", "Every tenant"]]} />
      ${isPublic === "no" && html`<${TextField} label="Tenant" value=${other} onValue=${setOther} placeholder="tenant" />`}
      <${Button} type="submit" icon="share" busy=${change.busy} disabled=${!who}>Share<//>
    </form>
    <${ErrorNote} error=${shares.error} retry=${shares.reload} />
    <${ErrorNote} error=${change.error} />
  </section>`;
}

const named = (who) => (who === "*" ? "every tenant" : who);
