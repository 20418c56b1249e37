/* What scrolls sideways can be reached with the keyboard; Safari and older browsers do not see to that themselves. */
"use strict";

(function () {
  const wide = "article pre, article .formula, article .output_area, article .table-wrapper, article p";

  function reach() {
    for (const box of document.querySelectorAll(wide)) {
      const scrolls = box.scrollWidth > box.clientWidth && /auto|scroll/.test(getComputedStyle(box).overflowX);
      if (scrolls) box.tabIndex = 0;
      else if (box.tabIndex === 0) box.removeAttribute("tabindex");
    }
  }

  addEventListener("load", reach);
  addEventListener("resize", reach);
  addEventListener("toggle", reach, true); // folded code that was opened
})();
