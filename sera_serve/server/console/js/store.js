// Values that several components share, and hooks for work that takes time.

import { useCallback, useEffect, useRef, useState } from "./html.js";

/** A value that can be watched. */
export class Store {
  #value;
  #watchers = new Set();

  constructor(value) {
    this.#value = value;
  }

  get value() {
    return this.#value;
  }

  set(value) {
    this.#value = value;
    for (const watcher of [...this.#watchers]) watcher(value);
  }

  /** Call `watcher` after each change. Returns the function that ends this. */
  watch(watcher) {
    this.#watchers.add(watcher);
    return () => this.#watchers.delete(watcher);
  }
}

/** The value of a store. The component is drawn again when the value changes. */
export function useStore(store) {
  const [value, setValue] = useState(store.value);
  useEffect(() => {
    setValue(store.value);
    return store.watch(setValue);
  }, [store]);
  return value;
}

/** Grows each time that the connection comes back. What was loaded before may be old then. */
export const connectionEpoch = new Store(0);

/**
 * Load something now, and again when `inputs` change or the connection comes back.
 *
 * `load(signal)` returns a promise. The result is `{data, error, loading, reload}`; `data` stays while it loads again.
 */
export function useLoad(load, inputs) {
  const epoch = useStore(connectionEpoch);
  const [round, setRound] = useState(0);
  const [state, setState] = useState({ data: null, error: null, loading: true });
  const shown = useRef(null);
  useEffect(() => {
    const controller = new AbortController();
    const key = JSON.stringify(inputs);
    const isOther = shown.current !== key;
    shown.current = key;
    setState((old) => ({ data: isOther ? null : old.data, error: isOther ? null : old.error, loading: true }));
    load(controller.signal).then(
      (data) => !controller.signal.aborted && setState({ data, error: null, loading: false }),
      (error) => !controller.signal.aborted && setState((old) => ({ data: old.data, error, loading: false })),
    );
    return () => controller.abort();
  }, [...inputs, epoch, round]);
  const reload = useCallback(() => setRound((number) => number + 1), []);
  return { ...state, reload };
}

/**
 * Load a list a page at a time, from its beginning: `{hasMore, more}` beside what `useLoad` gives.
 *
 * `read(after, signal)` returns a promise of a page: `{rows, next}`, and what else it tells. `next` is what the next page
 * comes after, and null on the last one. `data` is the newest page, with the `rows` of all. `more` reads one page on; a
 * reload reads as many rows as are shown.
 */
export function usePages(read, inputs, size) {
  const wanted = useRef(size);
  const before = useRef(null);
  const list = useLoad(async (signal) => {
    let pages = before.current ?? { rows: [], next: null };
    before.current = null;
    do {
      const page = await read(pages.next, signal);
      pages = { ...page, rows: [...pages.rows, ...page.rows] };
    } while (pages.next !== null && pages.rows.length < wanted.current);
    return pages;
  }, inputs);
  const more = () => {
    wanted.current = list.data.rows.length + size;
    before.current = list.data;
    list.reload();
  };
  return { ...list, hasMore: (list.data?.next ?? null) !== null, more };
}

/**
 * Ask now, and again `everyMs` after each answer, until `ask(signal)` resolves to true: `{error, reload}`.
 *
 * A tab that nobody sees asks nothing. A refusal ends it too: the same question would get the same answer.
 */
export function usePolling(ask, everyMs, inputs) {
  const [error, setError] = useState(null);
  const [round, setRound] = useState(0);
  useEffect(() => {
    const controller = new AbortController();
    const { signal } = controller;
    let timer = 0;
    // One question at a time: a tab that is seen again may still wait for the answer to the last one.
    let isAsking = false;
    let isOver = false;
    const poll = async () => {
      isAsking = true;
      try {
        isOver = (await ask(signal)) === true;
        if (!signal.aborted) setError(null);
      } catch (failure) {
        if (signal.aborted) return;
        setError(failure);
        isOver = failure.status >= 400 && failure.status < 500 && failure.status !== 429;
      }
      isAsking = false;
      wake(everyMs);
    };
    const wake = (pause) => {
      clearTimeout(timer);
      if (!document.hidden && !isAsking && !isOver && !signal.aborted) timer = setTimeout(poll, pause);
    };
    document.addEventListener("visibilitychange", () => wake(0), { signal });
    wake(0);
    return () => {
      controller.abort();
      clearTimeout(timer);
    };
  }, [...inputs, round]);
  const reload = useCallback(() => setRound((number) => number + 1), []);
  return { error, reload };
}

/** What `notify` has said: `{id, text}` of each. */
export const notices = new Store([]);
let noticeId = 0;

/** Say something for a few seconds, at the foot of the page. */
export function notify(text) {
  const id = (noticeId += 1);
  notices.set([...notices.value, { id, text }].slice(-3));
  setTimeout(() => notices.set(notices.value.filter((notice) => notice.id !== id)), 5000);
}

/** What dialog is open, or null: `[dialog, open, close]`. */
export function useDialog() {
  const [dialog, open] = useState(null);
  // A slow action closes the dialog that it was started in, not another one that was opened meanwhile.
  const close = () => open((now) => (now === dialog ? null : now));
  return [dialog, open, close];
}

/**
 * One action at a time, such as a form that is sent.
 *
 * The result is `{run, busy, error}`. `run` returns whether the action succeeded. A failure that comes when the component
 * is gone, such as a dialog that was closed, is told at the foot of the page.
 */
export function useAction(action) {
  const [state, setState] = useState({ busy: false, error: null });
  const current = useRef(action);
  const isMounted = useRef(true);
  current.current = action;
  useEffect(() => {
    isMounted.current = true;
    return () => (isMounted.current = false);
  }, []);
  const run = useCallback(async (...given) => {
    setState({ busy: true, error: null });
    try {
      await current.current(...given);
      if (isMounted.current) setState({ busy: false, error: null });
      return true;
    } catch (error) {
      if (isMounted.current) setState({ busy: false, error });
      // Its place is gone. A key that is not accepted is told where a person signs in.
      else if (error.status !== 401) notify(`It failed: ${error.message}`);
      return false;
    }
  }, []);
  return { ...state, run };
}
