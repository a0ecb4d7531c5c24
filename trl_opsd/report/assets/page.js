"use strict";
// The switch overrides what the system prefers, for this page and those opened after it.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("scheme");
  const dark = () => (root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
  const changed = () => { label(); document.dispatchEvent(new Event("scheme")); };
  try { root.style.colorScheme = localStorage.getItem("scheme") ?? ""; } catch { /* a browser that keeps nothing */ }
  button.addEventListener("click", () => {
    root.style.colorScheme = dark() ? "light" : "dark";
    try { localStorage.setItem("scheme", root.style.colorScheme); } catch { /* nor here */ }
    changed();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  label();
})();
