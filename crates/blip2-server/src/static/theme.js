// Before anything is drawn: the theme that was chosen here, if not the system's.
"use strict";
try {
  const theme = localStorage.getItem("blip2.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing follows the system.
}
