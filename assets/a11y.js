// Names and roles that the theme, ipywidgets and sphinxcontrib-bibtex leave out.
// Each one was found with axe-core; tests/book keeps the pages free of its findings.
(function () {
  "use strict";

  function name(element, text) {
    if (element && !element.getAttribute("aria-label")) element.setAttribute("aria-label", text);
  }

  function hideIcons(button) {
    button.querySelectorAll("i, svg").forEach(function (icon) {
      icon.removeAttribute("title");
      icon.removeAttribute("aria-labelledby");
      icon.setAttribute("aria-hidden", "true");
      icon.querySelectorAll("title").forEach(function (title) { title.remove(); });
    });
  }

  function theme() {
    document.querySelectorAll(".bd-sidebar-primary").forEach(function (sidebar) {
      sidebar.setAttribute("role", "region");
      name(sidebar, "Book");
    });
    // The icon of the present colour mode is a picture of the button's name, not a second name.
    document.querySelectorAll(".theme-switch-button").forEach(function (button) {
      hideIcons(button);
      new MutationObserver(function () { hideIcons(button); }).observe(button, { childList: true });
    });
    // A name that does not hold the visible text cannot be spoken to a voice control.
    document.querySelectorAll("button[aria-label], a[aria-label]").forEach(function (button) {
      const text = button.textContent.replace(/\s+/g, " ").trim();
      if (text) button.setAttribute("aria-label", text);
    });
  }

  // What scrolls must be reachable with the keyboard.
  function scrollable() {
    const boxes = "main pre, main .cell_output, main .pst-scrollable-table-container, main .output";
    document.querySelectorAll(boxes).forEach(function (box) {
      if (box.scrollWidth > box.clientWidth + 1 && box.tabIndex < 0) {
        box.setAttribute("tabindex", "0");
      }
    });
  }

  function widgets() {
    document.querySelectorAll(".widget-slider, .widget-hslider").forEach(function (slider) {
      const label = slider.querySelector(".widget-label");
      const readout = slider.querySelector(".widget-readout");
      const text = (label && label.textContent.trim()) || "slider";
      slider.querySelectorAll("[role=slider]").forEach(function (handle) { name(handle, text); });
      name(readout, text + ", value");
    });
    document.querySelectorAll(".widget-play button").forEach(function (button, i) {
      name(button, ["play or pause", "stop", "repeat"][i % 3]);
    });
    document.querySelectorAll(".widget-toggle-buttons").forEach(function (group) {
      const label = group.querySelector(".widget-label");
      group.setAttribute("role", "group");
      name(group, (label && label.textContent.trim()) || "choices");
    });
  }

  document.addEventListener("DOMContentLoaded", function () {
    const main = document.querySelector("main") || document.body;
    theme();
    scrollable();
    widgets();
    new MutationObserver(widgets).observe(main, { childList: true, subtree: true });
    window.addEventListener("load", scrollable);
    window.addEventListener("resize", scrollable);
    document.addEventListener("toggle", scrollable, true);  // a fold that opened
  });
})();
