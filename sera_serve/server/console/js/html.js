// What the views use of the library: htm's templates over Preact's components, and Preact's hooks.

export {
  html,
  render,
  useCallback,
  useEffect,
  useErrorBoundary,
  useLayoutEffect,
  useMemo,
  useRef,
  useState,
} from "../vendor/htm/standalone.module.js";
