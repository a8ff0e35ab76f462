// Calls of the server's API, with the key of this browser tab.

import { Store, connectionEpoch } from "./store.js";

// The page lies at ROOT/console, so that a proxy may put the server under a path of its own.
const ROOT = new URL("../../", import.meta.url);
const RETRY_AFTER_MS = [1000, 2000, 3000, 5000];

/** Whether the server can be reached. */
export const isConnected = new Store(true);

/** The server refused a request, or failed. */
export class ApiError extends Error {
  constructor(status, body, headers) {
    const error = body?.error ?? {};
    super(error.message ?? `The answer has status ${status}, and no message. A proxy may have sent it.`);
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
    this.requestId = headers?.get("x-request-id") ?? null;
    const seconds = Number(headers?.get("retry-after"));
    this.retryAfter = seconds > 0 ? seconds : null;
  }
}

const LOST = {
  GET: "The server does not answer. This page tries again by itself, and goes on when the server is back.",
  QUESTION: "The server did not answer. This page does not ask again by itself: run it again when the server is back.",
  STREAM: "The answer broke off. This page does not ask again by itself: run it again when the server is back.",
  // Only what changes nothing is sent again.
  OTHER: "The server did not answer. This page does not send it again by itself, since it may be done already: look, and try again, when the server is back.",
};

// These change nothing, though they are sent by POST.
const QUESTIONS = ["/v1/generate", "/v1/chat/completions", "/v1/classify"];

/** The request got no answer, or a part of one: a stream's `method` is then STREAM. */
export class ConnectionLost extends Error {
  constructor(method) {
    super(LOST[method] ?? LOST.OTHER);
  }
}

/** The browser cannot read a file that a person chose. It gives no reason when it sends one: it looks like a lost connection. */
export class UnreadableFile extends Error {
  constructor(name) {
    super(`the file ${name} has changed since it was chosen, or is gone: choose it again`);
  }
}

let key = null;
let whenRefused = () => {};

/** Send this key with each request; null sends none. */
export function setKey(secret) {
  key = secret;
}

/** Call `action(error)` when the server does not accept the key, unless another one has taken its place meanwhile. */
export function onRefusedKey(action) {
  whenRefused = action;
}

/** Write a path with its parts encoded: path`/v1/adapters/${tenant}/${name}`. `@` stays readable. */
export function path(parts, ...values) {
  return parts.reduce((whole, part, index) => whole + encode(values[index - 1]) + part);
}

function encode(value) {
  // A browser takes them for steps in the path, however they are written.
  if (value === "." || value === "..") throw new Error(`"${value}" is no name; write another one`);
  return encodeURIComponent(value).replaceAll("%40", "@");
}

/** GET. `query` has no entry for what is null or empty. */
export function get(url, query = {}, signal = undefined) {
  return call("GET", url, { query, signal });
}

/** POST, PUT or DELETE. `body` is sent as JSON, or as it is if it is a form. */
export function send(method, url, body = undefined, signal = undefined) {
  return call(method, url, { body, signal });
}

/** Send a request and return the response once its status is known to be good. */
export async function open(method, url, { body, query, signal } = {}) {
  const used = key;
  const headers = authorization();
  let content;
  if (body instanceof FormData) {
    content = body;
  } else if (body !== undefined) {
    content = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(address(url, query), {
      method, headers, signal, body: content, credentials: "omit", cache: "no-store",
    });
  } catch (error) {
    throw lost(error, signal, QUESTIONS.includes(url) ? "QUESTION" : method);
  }
  if (!response.ok) throw refused(new ApiError(response.status, await jsonOf(response), response.headers), used);
  return response;
}

async function call(method, url, options) {
  const response = await open(method, url, options);
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch (error) {
    throw lost(error, options.signal, method);
  }
}

/**
 * Upload a form. A promise of the answer; `onProgress(sent, total)` is called with bytes. Throws `UnreadableFile`, too.
 *
 * fetch() tells nothing of the progress of a body.
 */
export async function upload(url, form, { onProgress, signal }) {
  for (const file of form.values()) {
    if (file instanceof File) await file.slice(0, 1).arrayBuffer().catch(() => { throw new UnreadableFile(file.name); });
  }
  signal.throwIfAborted();
  return new Promise((resolve, reject) => {
    const used = key;
    const request = new XMLHttpRequest();
    request.open("POST", address(url));
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.responseType = "text";
    request.upload.onprogress = (event) => onProgress(event.loaded, event.total);
    request.onload = () => {
      const body = parsed(request.responseText);
      const headers = { get: (name) => request.getResponseHeader(name) };
      if (request.status >= 200 && request.status < 300 && body !== null) resolve(body);
      else reject(refused(new ApiError(request.status, body, headers), used));
    };
    request.onerror = () => reject(lost(new TypeError("no answer"), signal, "POST"));
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

/** The whole address of a path of the API. */
export function address(url, query = {}) {
  const whole = new URL(`.${url}`, ROOT);
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") whole.searchParams.set(name, value);
  }
  return whole;
}

function authorization() {
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

async function jsonOf(response) {
  return parsed(await response.text().catch(() => ""));
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function refused(error, used) {
  error.isWithoutKey = used === null;
  if (error.status === 401 && used === key) whenRefused(error);
  return error;
}

/** What to throw after a request without an answer. An aborted request is nobody's fault. */
export function lost(error, signal, method) {
  if (signal?.aborted || error.name === "AbortError") return error;
  watchConnection();
  return new ConnectionLost(method);
}

async function watchConnection() {
  if (!isConnected.value) return;
  isConnected.set(false);
  for (let round = 0; ; round += 1) {
    await new Promise((resolve) => setTimeout(resolve, RETRY_AFTER_MS[Math.min(round, RETRY_AFTER_MS.length - 1)]));
    try {
      const answer = await fetch(address("/healthz"), { cache: "no-store", credentials: "omit" });
      if (answer.ok) break;
    } catch {
      // Still away.
    }
  }
  isConnected.set(true);
  connectionEpoch.set(connectionEpoch.value + 1);
}

/** Whether an error only says that its request was stopped. */
export function isAbort(error) {
  return error?.name === "AbortError";
}
