// Finding adapters among many. The API lists them in order of their names, a page at a time; this module looks through
// the pages until enough adapters match.

import { get } from "./api.js";
import { useCallback, useEffect, useRef, useState } from "./html.js";
import { connectionEpoch, useStore } from "./store.js";

const PAGE = 500;
// One step looks through so many at most: 20 requests. Then a person decides.
const MOST_LOOKED_AT = 10_000;
const TENANT = /^[a-z0-9][a-z0-9._-]{0,63}$/;

/** What a search without any filter looks like. */
export const NO_FILTERS = { text: "", task: "", method: "", rank: "", split: "", size: "" };
/** Choices of size: value, text, bytes from, bytes to. */
export const SIZES = [
  ["", "Any size", 0, Infinity],
  ["s", "Under 100 KiB", 0, 100 << 10],
  ["m", "100 KiB to 1 MiB", 100 << 10, 1 << 20],
  ["l", "1 to 10 MiB", 1 << 20, 10 << 20],
  ["xl", "Over 10 MiB", 10 << 20, Infinity],
];

/** Whether an adapter matches the filters; `task` may be several, with commas between them. */
export function matches(adapter, filters) {
  const [, , least, most] = SIZES.find(([value]) => value === filters.size) ?? SIZES[0];
  return (
    adapter.adapter.includes(filters.text.trim().toLowerCase()) &&
    (!filters.task || filters.task.split(",").includes(adapter.task)) &&
    (!filters.method || adapter.method === filters.method) &&
    (!filters.rank || adapter.ranks.includes(Number(filters.rank))) &&
    (!filters.split || adapter.splits.includes(Number(filters.split))) &&
    adapter.bytes >= least &&
    adapter.bytes < most
  );
}

/** Goes through the pages. `rows` are the adapters that matched so far. */
class Walk {
  constructor(filters) {
    this.filters = filters;
    this.isFiltered = Object.values(filters).some(Boolean);
    this.rows = [];
    this.looked = 0;
    this.isDone = false;
    this.after = null;
    const tenant = filters.text.includes("/") ? filters.text.trim().toLowerCase().split("/")[0] : "";
    this.tenant = TENANT.test(tenant) ? tenant : null;
  }

  /** Find `number` more, or all that are left. Resolves to this walk's new state. */
  async more(number, signal) {
    const enough = this.rows.length + number;
    const furthest = this.looked + MOST_LOOKED_AT;
    while (!this.isDone && this.rows.length < enough && this.looked < furthest) {
      const limit = this.isFiltered ? PAGE : Math.min(number, PAGE);
      const page = await get("/v1/adapters", { limit, after: this.after, tenant: this.tenant }, signal);
      this.looked += page.adapters.length;
      this.rows = [...this.rows, ...page.adapters.filter((adapter) => matches(adapter, this.filters))];
      this.after = page.next;
      this.isDone = page.next === null;
    }
    return { rows: this.rows, looked: this.looked, isDone: this.isDone, error: null, busy: false };
  }
}

const NOTHING = { rows: [], looked: 0, isDone: false, error: null, busy: true };

/**
 * Adapters that match the filters: `{rows, looked, isDone, error, busy, more, again}`.
 *
 * `number` more are looked for at a time; `first` is how many there were when a person left the list.
 */
export function useSearch(filters, number, first = 0) {
  const epoch = useStore(connectionEpoch);
  const [round, setRound] = useState(0);
  const [found, setFound] = useState(NOTHING);
  const current = useRef(null);
  const key = JSON.stringify(filters);
  // Which filters the rows are of, and how many: they are there again after a lost connection, not the first part alone.
  const shown = useRef({ key, number: first });
  const step = useCallback((walk, controller, wanted) => {
    walk.more(wanted, controller.signal).then(
      (state) => {
        if (controller.signal.aborted) return;
        shown.current = { key: JSON.stringify(walk.filters), number: state.rows.length };
        setFound(state);
      },
      (error) => {
        if (controller.signal.aborted) return;
        // Rows of other filters must not stay beside these, as if they matched.
        const areOwn = shown.current.key === JSON.stringify(walk.filters);
        setFound((old) => ({ ...(areOwn ? old : NOTHING), error, busy: false }));
      },
    );
  }, []);
  useEffect(() => {
    const controller = new AbortController();
    const walk = new Walk(filters);
    current.current = { walk, controller };
    const wanted = shown.current.key === key ? Math.max(number, shown.current.number) : number;
    setFound((old) => ({ ...old, busy: true, error: null }));
    // While a person types, each key would start a search.
    const timer = setTimeout(() => step(walk, controller, wanted), filters.text ? 200 : 0);
    return () => {
      clearTimeout(timer);
      controller.abort();
    };
  }, [key, epoch, round]);
  const more = useCallback(() => {
    setFound((old) => ({ ...old, busy: true, error: null }));
    step(current.current.walk, current.current.controller, number);
  }, [step, number]);
  const again = useCallback(() => setRound((value) => value + 1), []);
  return { ...found, more, again };
}
