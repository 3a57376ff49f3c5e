// Runs before the first paint: the chosen theme, otherwise the system's.
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("rlsys-theme"); } catch { return null; } };
  const apply = () => {
    document.documentElement.dataset.theme = stored() || (system.matches ? "dark" : "light");
    document.dispatchEvent(new CustomEvent("themechange"));
  };
  system.addEventListener("change", apply);
  window.rlsysTheme = {
    toggle() {
      const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      try { localStorage.setItem("rlsys-theme", next); } catch { document.documentElement.dataset.theme = next; }
      apply();
    },
  };
  apply();
})();
